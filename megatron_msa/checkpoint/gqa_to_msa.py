"""Dense (GQA) -> MSA: copies a Megatron distributed checkpoint and adds index branches.

`pretrain_msa.py` continues from the copy in the warmup phase. Everything the source holds stays as it is, to
the bit: parameters, optimizer state, iteration, samples, random states, learning-rate schedule.
(`pretrain_msa.py --msa-init-index` does the same while it loads, without a copy.)
"""

from __future__ import annotations

import argparse
import copy
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_msa.attention.index_initialization import (
    DEFAULT_METHOD,
    METHODS,
    IndexHeads,
    attention_heads,
    check_method,
    derive,
)
from megatron_msa.checkpoint.hf.report import Report
from megatron_msa.checkpoint.hf.target import new_folder
from megatron_msa.checkpoint.hf.torch_dist import Chunk, DistributedCheckpoint, write_checkpoint
from megatron_msa.checkpoint.index_keys import INDEX_BRANCH, OPTIMIZER_STATE, layer_of, stacked, stacks_layers
from megatron_msa.checkpoint.inspection import check_extensible, find_checkpoint
from megatron_msa.checkpoint.layout import Layout, layout_of
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig, rotary_dims

Shape = tuple[int, ...]
_COPIES_OF_PARAMETERS = ("fp32_param", "param", "master_param")
"""Optimizer states that hold the parameter itself; others (moments) start at zero."""


def add_subcommand(subparsers: Any) -> None:
    """Register ``gqa-to-msa``."""
    parser = subparsers.add_parser(
        "gqa-to-msa",
        help="a dense (GQA) Megatron distributed checkpoint to one with index branches",
        description=__doc__,
    )
    parser.add_argument("--load", type=Path, required=True, help="Folder of the dense run's checkpoints.")
    parser.add_argument("--ckpt-step", type=int, help="Iteration to convert. Default: the latest.")
    parser.add_argument("--save", type=Path, required=True, help="Target folder; must not exist.")
    parser.add_argument(
        "--index-init",
        choices=METHODS,
        default=DEFAULT_METHOD,
        help="Initial values: random, the mean query head of each group and the mean key head, or the best "
        "low-rank approximation of the groups' scores. Default: %(default)s.",
    )
    parser.add_argument(
        "--msa-layer-freq",
        default="1",
        help="Which layers get an index branch, as in training. Default: all.",
    )
    parser.add_argument(
        "--msa-indexer-head-dim", type=int, help="Head dimension of the index branch. Default: --kv-channels."
    )
    parser.add_argument(
        "--drop-optimizer",
        action="store_true",
        help="Leave the optimizer state out: training starts a new one.",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="Of --index-init random. Default: %(default)s."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Run both models on the same random tokens in fp32 with full attention and print the largest "
        "difference of their logits: 0. Needs memory for one of them, 4 bytes per parameter.",
    )
    parser.add_argument("--verify-tokens", type=int, default=256, metavar="N", help="Default: %(default)s.")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """The command."""
    report = convert(
        options.load,
        options.save,
        method=options.index_init,
        step=options.ckpt_step,
        layer_freq=options.msa_layer_freq,
        index_head_dim=options.msa_indexer_head_dim,
        keep_optimizer=not options.drop_optimizer,
        seed=options.seed,
    )
    print(report.describe())
    if options.verify:
        from megatron_msa.checkpoint.verify_gqa import verify

        target = find_checkpoint(str(options.save))
        assert target is not None
        print(verify(Path(report.source), target, num_tokens=options.verify_tokens))


def convert(
    load: Path,
    save: Path,
    *,
    method: str = DEFAULT_METHOD,
    step: int | None = None,
    layer_freq: str = "1",
    index_head_dim: int | None = None,
    keep_optimizer: bool = True,
    seed: int = 1234,
) -> Report:
    """Write the checkpoint of ``load`` with index branches to ``save``, one stored chunk in memory at a time.

    Args:
        load: folder with ``latest_checkpointed_iteration.txt``.
        save: must not exist; appears when it is complete.
        method: see `index_initialization`.
        step: iteration, by default the latest.
        layer_freq: --msa-layer-freq.
        index_head_dim: --msa-indexer-head-dim.
        keep_optimizer: False leaves its state out.
        seed: of the method "random".

    Raises:
        ConfigError: nothing to convert, something that cannot be converted, damaged files, no place.
    """
    source = find_checkpoint(str(load), step)
    if source is None:
        raise ConfigError(f"--load {load} holds no checkpoint (no latest_checkpointed_iteration.txt)")
    opened = DistributedCheckpoint(source)
    plan = _plan(opened, method, layer_freq, index_head_dim, seed)
    keeps = keep_optimizer and any(OPTIMIZER_STATE.match(key) for key in opened.shapes)
    if keep_optimizer:
        check_extensible(source, "convert with --drop-optimizer")
    report = Report("gqa-to-msa", method, str(source), str(save))
    chunks = [*_copied(plan, report, keeps), *_new(plan, report, keeps)]
    report.count(plan.layout.shapes, {})
    size = sum(torch.Size(chunk.shape).numel() * chunk.dtype.itemsize for chunk in chunks)
    with new_folder(save, expected_bytes=size) as folder:
        write_checkpoint(folder / source.name, chunks, _objects(plan, keeps), _common_state(plan, keeps))
        tracker = "release" if source.name == "release" else str(int(source.name.removeprefix("iter_")))
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
        report.write(folder)
    return report


class _Plan(NamedTuple):
    source: DistributedCheckpoint
    config: MSAModelConfig
    layout: Layout
    """Of the target."""
    method: str
    seed: int
    targets: dict[str, list[str]]
    """Name of a source parameter -> its names in the target: several if it is split into layers."""


def _plan(
    source: DistributedCheckpoint, method: str, layer_freq: str, index_head_dim: int | None, seed: int
) -> _Plan:
    # Megatron's training package behind it takes seconds to import.
    from megatron_msa.model.from_checkpoint import model_config_from_checkpoint

    trained = sorted(key for key in source.shapes if INDEX_BRANCH.search(key))
    if trained:
        raise ConfigError(
            f"{source.folder} has index branches already ({trained[0]} and {len(trained) - 1} more tensors): "
            "continue from it with pretrain_msa.py --load"
        )
    config = model_config_from_checkpoint(
        source.common_state["args"],
        msa_layer_freq=layer_freq,
        msa_indexer_head_dim=index_head_dim,
        msa_schedule="warmup@0",
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    transformer = config.transformer
    assert transformer.kv_channels is not None
    assert transformer.num_query_groups is not None
    assert transformer.msa_indexer_head_dim is not None
    check_method(
        method,
        head_dim=transformer.kv_channels,
        index_head_dim=transformer.msa_indexer_head_dim,
        num_groups=transformer.num_query_groups,
        rotary_dims=rotary_dims(config),
    )
    layout = layout_of(config, source.common_state.get("content_metadata"))
    return _Plan(source, config, layout, method, seed, _matched(source, layout))


def _matched(source: DistributedCheckpoint, layout: Layout) -> dict[str, list[str]]:
    """Compare the parameters of the source with those that the target needs."""
    parameters = {key: shape for key, shape in source.shapes.items() if not key.startswith(_OPTIMIZER)}
    targets: dict[str, list[str]] = {}
    missing, wrong = [], []
    for key, shape in layout.shapes.items():
        if INDEX_BRANCH.search(key):
            continue
        stored = key if key in parameters else stacked(key)
        if stored not in parameters:
            missing.append(key)
            continue
        found = parameters[stored] if stored == key else parameters[stored][1:]
        if found != shape:
            wrong.append(f"{key} is {list(found)} and would be {list(shape)}")
        targets.setdefault(stored, []).append(key)
    extra = sorted(parameters.keys() - targets.keys())
    for what, names in (
        ("lacks tensors of the model that its arguments describe", missing),
        ("has tensors of other shapes than its arguments describe", wrong),
        ("has tensors that the model its arguments describe does not have", extra),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ConfigError(f"{source.folder} {what}: {', '.join(names[:5])}{more}")
    return targets


_OPTIMIZER = ("optimizer.", "chained_")


def _copied(plan: _Plan, report: Report, keeps_optimizer: bool) -> Iterator[Chunk]:
    source = plan.source
    for stored in source.shapes:
        state = OPTIMIZER_STATE.match(stored)
        if stored.startswith(_OPTIMIZER) and (state is None or not keeps_optimizer):
            report.ignored[stored] = list(source.shapes[stored])
            continue
        prefix, parameter = (state["state"], state["parameter"]) if state else ("", stored)
        for target in plan.targets[parameter]:
            if not state:
                report.mapped[target] = {"shape": list(plan.layout.shapes[target]), "source": stored}
            yield from _chunks_of(source, stored, prefix + target, splits=target != parameter)


def _chunks_of(source: DistributedCheckpoint, stored: str, target: str, *, splits: bool) -> Iterator[Chunk]:
    """The chunks of a tensor; with ``splits`` those of one layer, whose axis is dropped."""
    layer = layer_of(target) if splits else None
    axes = slice(1 if splits else 0, None)
    for offset, shape in source.chunks(stored):
        if layer is not None:
            if not offset[0] <= layer < offset[0] + shape[0]:
                continue
            offset, shape = (layer, *offset[1:]), (1, *shape[1:])
        load = partial(source.read, stored, offset, shape)
        yield Chunk(
            target, source.shapes[stored][axes], offset[axes], shape[axes], source.dtypes[stored], load
        )


def _new(plan: _Plan, report: Report, keeps_optimizer: bool) -> Iterator[Chunk]:
    """The parameters of the index branches and their optimizer state, layer by layer."""
    values = lru_cache(maxsize=1)(partial(_index_heads, plan))
    for key, shape in plan.layout.shapes.items():
        match = INDEX_BRANCH.search(key)
        if match is None:
            continue
        report.initialised[key] = list(shape)
        attention = key[: match.end("branch")].removesuffix("index_branch.")
        qkv = f"{attention}linear_qkv.weight"
        stored = qkv if qkv in plan.source.shapes else stacked(qkv)
        for layer in range(shape[0]) if stacks_layers(key) else (None,):
            offset = (layer or 0, *(0 for _ in shape[1:]))
            part = shape if layer is None else (1, *shape[1:])
            load = partial(_value, plan, values, attention, layer, key, part)
            dtype = plan.source.dtypes[stored]
            yield Chunk(key, shape, offset, part, dtype, partial(_cast, load, dtype))
            for name, state_dtype in _states(plan.source, stored) if keeps_optimizer else ():
                state = name.rstrip(".").rpartition(".")[2]
                load_state = load if state in _COPIES_OF_PARAMETERS else partial(torch.zeros, part)
                # The optimizer's copy starts as what the model computes with.
                source = partial(_cast, load_state, dtype)
                yield Chunk(name + key, shape, offset, part, state_dtype, partial(_cast, source, state_dtype))


def _cast(load: Any, dtype: torch.dtype) -> Tensor:
    return load().to(dtype)


def _states(source: DistributedCheckpoint, parameter: str) -> Iterator[tuple[str, torch.dtype]]:
    """What the optimizer keeps of a parameter: (prefix of the name, dtype)."""
    for key, dtype in source.dtypes.items():
        match = OPTIMIZER_STATE.match(key)
        if match is not None and match["parameter"] == parameter:
            yield match["state"], dtype


def _value(plan: _Plan, values: Any, attention: str, layer: int | None, key: str, shape: Shape) -> Tensor:
    """Initial value of one parameter of one layer's index branch."""
    transformer = plan.config.transformer
    shift = 1.0 if transformer.layernorm_zero_centered_gamma else 0.0
    is_query = "index_q" in key.rpartition("index_branch.")[2]
    if "norm" in key:
        gain = 1.0
        if plan.method != "random":
            heads: IndexHeads = values(attention, layer)
            gain = heads.query_gain if is_query else heads.key_gain
        return torch.full(shape, gain - shift)
    if plan.method == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed + zlib.crc32(f"{key} {layer}".encode()))
            value = torch.empty(shape[-2:])
            transformer.init_method(value)
        return value.reshape(shape)
    heads = values(attention, layer)
    return (heads.query.flatten(0, 1) if is_query else heads.key).reshape(shape)


def _index_heads(plan: _Plan, attention: str, layer: int | None) -> IndexHeads:
    """Derive the index heads of a layer; ``layer`` is None if the name ``attention`` says which."""
    transformer = plan.config.transformer
    number = layer if layer is not None else layer_of(attention)

    def read(name: str) -> Tensor | None:
        key = attention + name
        if key in plan.source.shapes:
            at = layer
        else:
            key, at = stacked(key), number
        if key not in plan.source.shapes:
            return None
        shape = plan.source.shapes[key]
        if at is None:
            return plan.source.read(key, (0,) * len(shape), shape)
        return plan.source.read(key, (at, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]

    qkv, input_norm = read("linear_qkv.weight"), read("linear_qkv.layer_norm_weight")
    assert qkv is not None
    assert input_norm is not None
    no_rope = transformer.no_rope_freq and number is not None and transformer.no_rope_freq[number]
    heads = attention_heads(
        transformer,
        qkv=qkv,
        input_norm=input_norm,
        q_norm=read("q_layernorm.weight"),
        k_norm=read("k_layernorm.weight"),
        rotary_dims=0 if no_rope else rotary_dims(plan.config),
    )
    assert transformer.msa_indexer_head_dim is not None
    return derive(plan.method, heads, transformer.msa_indexer_head_dim)


def _objects(plan: _Plan, keeps_optimizer: bool) -> dict[str, Any]:
    """States that are not tensors: those of the source, and the empty ones of the index branches."""
    objects = {name: data for name, data in plan.layout.objects.items() if INDEX_BRANCH.search(name)}
    splits = any(key != target for key, targets in plan.targets.items() for target in targets)
    for name in plan.source.objects():
        if name.startswith(_OPTIMIZER) and not keeps_optimizer:
            continue
        data = plan.source.read_object(name)
        objects[_one_layer(name) if splits and name.startswith("decoder.layers.") else name] = data
    return objects


def _one_layer(name: str) -> str:
    """The name of a layer's object where layers are stored one by one, from that in the stack of all."""
    entry = ShardedObject.empty_from_unique_key(name)
    layer, offset, shape = entry.global_offset[0], entry.global_offset[1:], entry.global_shape[1:]
    key = entry.key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
    return ShardedObject(key, None, shape or (1,), offset or (0,)).unique_key


def _common_state(plan: _Plan, keeps_optimizer: bool) -> dict[str, Any]:
    state = dict(plan.source.common_state)
    args = state["args"] = copy.copy(state["args"])
    args.msa_layer_freq = plan.config.transformer.msa_layer_freq
    args.msa_indexer_head_dim = plan.config.transformer.msa_indexer_head_dim
    if not keeps_optimizer:
        state.pop("optimizer", None)
        args.no_save_optim = True  # tells Megatron not to look for it
    return state
