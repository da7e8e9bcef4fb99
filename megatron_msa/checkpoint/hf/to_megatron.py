"""Hugging Face -> Megatron: a model folder becomes a distributed checkpoint that `--load` takes."""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_msa.checkpoint.hf import sidecar
from megatron_msa.checkpoint.hf.command import add_common_arguments, is_allowed, refuse
from megatron_msa.checkpoint.hf.families import by_config
from megatron_msa.checkpoint.hf.families.base import Family
from megatron_msa.checkpoint.hf.mapping import Mapped, map_names
from megatron_msa.checkpoint.hf.megatron_model import Blueprint, blueprint
from megatron_msa.checkpoint.hf.report import Report
from megatron_msa.checkpoint.hf.safetensors_files import SafetensorsReader
from megatron_msa.checkpoint.hf.settings import NO_VISION, Settings, to_arguments, to_bash_array, to_flags
from megatron_msa.checkpoint.hf.target import new_folder
from megatron_msa.checkpoint.hf.torch_dist import Chunk, write_checkpoint
from megatron_msa.checkpoint.hf.transforms import Geometry
from megatron_msa.errors import ConfigError

FLAGS_NAME = "megatron_flags.sh"
_DEFAULT_VOCAB_MULTIPLE = 128


def add_subcommand(subparsers: Any) -> None:
    """Register ``hf-to-megatron``."""
    parser = subparsers.add_parser(
        "hf-to-megatron",
        help="a Hugging Face model (safetensors) to a Megatron distributed checkpoint",
        description=__doc__,
    )
    add_common_arguments(parser)
    parser.add_argument("--load", type=Path, required=True, help="Folder with config.json and safetensors.")
    parser.add_argument(
        "--pad-vocab-to-multiple-of",
        type=int,
        default=_DEFAULT_VOCAB_MULTIPLE,
        metavar="N",
        help="Rows of zeros are added to the vocabulary until it divides by N, which tensor parallelism must "
        "divide. Default: %(default)s.",
    )
    parser.add_argument(
        "--allow-missing",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="Initialise tensors that the model lacks if their Megatron name contains one of these texts, "
        "for example index_branch. Everything else that is missing is an error.",
    )
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="Leave out the vision part of a multimodal model and convert the language model.",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="Of initialised tensors. Default: %(default)s."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command."""
    report = convert(
        args.load,
        args.save,
        allow_missing=args.allow_missing,
        allow_extra=args.allow_extra,
        vocab_multiple=args.pad_vocab_to_multiple_of,
        text_only=args.text_only,
        seed=args.seed,
    )
    print(report.describe())
    print(f"\nFlags of the model ({args.save / FLAGS_NAME}):\n{(args.save / FLAGS_NAME).read_text()}")
    if args.verify:
        from megatron_msa.checkpoint.hf.verify import verify

        print(report.verification_memory())
        print(verify(args.load, args.save / "release", num_tokens=args.verify_tokens))


def convert(
    source: Path,
    target: Path,
    *,
    allow_missing: list[str] | None = None,
    allow_extra: list[str] | None = None,
    vocab_multiple: int = _DEFAULT_VOCAB_MULTIPLE,
    text_only: bool = False,
    seed: int = 1234,
) -> Report:
    """Convert the model in ``source`` into the checkpoint ``target``, one tensor in memory at a time.

    The target holds ``release`` (the checkpoint), the flags of the model, the report, and in ``hf`` the
    files that the way back needs.

    Raises:
        ConfigError: a model that cannot be converted, damaged files, a target that cannot be written.
    """
    if vocab_multiple < 1:
        raise ConfigError(f"--pad-vocab-to-multiple-of is {vocab_multiple}; it must be positive")
    plan = _plan(source, vocab_multiple, text_only=text_only)
    report = Report("hf-to-megatron", plan.family.name, str(source), str(target))
    report.padding_rows = plan.geometry.padded_vocab_size - plan.geometry.vocab_size
    missing = _match(plan, report, allow_missing or [], allow_extra or [])
    chunks = list(_chunks(plan, missing, seed))
    expected = sum(torch.Size(chunk.shape).numel() * chunk.dtype.itemsize for chunk in chunks)
    with new_folder(target, expected_bytes=expected) as folder:
        common_state = {
            "args": to_arguments(plan.settings),
            "iteration": 0,
            "checkpoint_version": 3.0,
            "num_floating_point_operations_so_far": 0,
        }
        write_checkpoint(folder / "release", chunks, plan.blueprint.objects, common_state)
        (folder / "latest_checkpointed_iteration.txt").write_text("release")
        companions = folder / sidecar.FOLDER
        companions.mkdir()
        shutil.copyfile(source / sidecar.CONFIG_NAME, companions / sidecar.CONFIG_NAME)
        has_tokenizer = bool(sidecar.copy_companions(source, companions))
        (folder / FLAGS_NAME).write_text(_flags(plan, target if has_tokenizer else None))
        report.write(folder)
    return report


class _Plan(NamedTuple):
    source: Path
    family: Family
    settings: Settings
    geometry: Geometry
    reader: SafetensorsReader
    blueprint: Blueprint
    mapped: dict[str, Mapped]
    dtype: torch.dtype
    """The most frequent one in the files."""


def _plan(source: Path, vocab_multiple: int, *, text_only: bool) -> _Plan:
    raw = sidecar.read_config(source)
    family = by_config(raw, str(source / sidecar.CONFIG_NAME))
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            f"{source} is quantised ({raw['quantization_config'].get('quant_method', 'unknown method')}); "
            "convert a copy in bf16 or fp32"
        )
    config = sidecar.load_config(source)
    language = family.language_config(config)
    padded = -(-language.vocab_size // vocab_multiple) * vocab_multiple
    settings = family.to_settings(config, padded)
    if text_only:
        settings |= NO_VISION
    reader = SafetensorsReader(source, family.spelled)
    counts: dict[torch.dtype, int] = {}
    for info in reader.tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    dtype = max(counts, key=lambda each: counts[each])
    bp = blueprint(settings, dtype)
    geometry = Geometry.of(settings, language.vocab_size)
    return _Plan(
        source, family, settings, geometry, reader, bp, map_names(family.rules, bp.shapes, family.name), dtype
    )


def _match(plan: _Plan, report: Report, allow_missing: list[str], allow_extra: list[str]) -> set[str]:
    """Compare what the model needs with what the files have; returns the Megatron tensors to initialise."""
    found = plan.reader.tensors
    wanted: dict[str, tuple[int, ...]] = {}
    absent: dict[str, list[int]] = {}
    for name, (rule, parts) in plan.mapped.items():
        example = torch.empty(plan.blueprint.shapes[name], device="meta")
        shapes = [tuple(each.shape) for each in rule.functions.to_hf(example, plan.geometry)]
        for part, shape in zip(parts, shapes, strict=True):
            if part.entry is None:
                wanted[part.name] = shape
            else:
                count = max(wanted.get(part.name, (0,))[0], part.entry + 1)
                wanted[part.name] = (count, *shape)
        if any(part.name not in found for part in parts):
            absent[name] = list(plan.blueprint.shapes[name])
        else:
            report.mapped[name] = {
                "shape": list(plan.blueprint.shapes[name]),
                "transform": rule.transform,
                "hf": [str(part) for part in parts],
            }
    report.missing = {name: list(wanted[name]) for name in wanted if name not in found}
    refuse(
        {name: shape for name, shape in absent.items() if not is_allowed(name, allow_missing)},
        f"{plan.source} lacks what these tensors of the model are made of",
        "--allow-missing initialises those whose name contains a given text",
    )
    for name in absent:
        parts = plan.mapped[name].parts
        there = [str(part) for part in parts if part.name in found]
        if there:
            raise ConfigError(
                f"{plan.source} has {', '.join(there)} but not all of {', '.join(map(str, parts))}, which "
                "Megatron keeps in one tensor; complete the files"
            )
    report.initialised = absent
    wrong = [
        f"{name} has shape {list(found[name].shape)}, by config.json it is {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        raise ConfigError(f"{plan.source}: {wrong[0]} ({len(wrong)} such tensors)")
    _check_types(plan)
    patterns = plan.family.ignored
    if not plan.settings["untie_embeddings_and_output_weights"]:
        patterns = (*patterns, r"(language_model\.)?lm_head\.weight")  # a copy of the embedding
    if plan.family.copied_from_source is not None and plan.settings["vision_mode"] == "none":
        patterns = (*patterns, plan.family.copied_from_source)
    extra = {name: list(info.shape) for name, info in found.items() if name not in wanted}
    report.ignored = {name: shape for name, shape in extra.items() if is_allowed(name, patterns, regex=True)}
    report.extra = {name: shape for name, shape in extra.items() if name not in report.ignored}
    refuse(
        {name: shape for name, shape in report.extra.items() if not is_allowed(name, allow_extra)},
        f"{plan.source} has tensors that {plan.family.name} does not have in Megatron",
        "--allow-extra leaves out those whose name contains a given text",
    )
    report.count(plan.blueprint.shapes, {name: shape for name, shape in wanted.items() if name in found})
    return set(absent)


def _check_types(plan: _Plan) -> None:
    """A matrix put together of several types would be stored in the widest, and come back in it."""
    tensors = plan.reader.tensors
    for _, parts in plan.mapped.values():
        types = {tensors[part.name].dtype for part in parts if part.name in tensors}
        if len(types) > 1:
            raise ConfigError(
                f"{plan.source}: {' and '.join(map(str, parts))} have different types "
                f"({', '.join(sorted(map(str, types)))}), but Megatron keeps them in one tensor; convert the "
                "model to one type first"
            )


def _chunks(plan: _Plan, missing: set[str], seed: int) -> Iterator[Chunk]:
    for name, pieces in plan.blueprint.pieces.items():
        parts = plan.mapped[name].parts
        if name in missing:
            dtype = plan.blueprint.dtypes[name]
            load = partial(_initial, plan, name, dtype, seed)
        else:
            dtype = plan.reader.tensors[parts[0].name].dtype
            load = partial(_converted, plan, name)
        start = 0
        whole = _Latest(load)
        for piece in pieces:
            rows = slice(start, start + piece.shape[0])
            last = piece is pieces[-1]
            yield Chunk(
                piece.key,
                piece.global_shape,
                piece.offset,
                piece.chunk_shape,
                dtype,
                partial(whole.rows, rows, last=last),
            )
            start += piece.shape[0]


class _Latest:
    """A tensor that is loaded for its first piece and forgotten with its last."""

    def __init__(self, load: Any) -> None:
        self._load = load
        self._tensor: Tensor | None = None

    def rows(self, rows: slice, *, last: bool) -> Tensor:
        tensor = self._load() if self._tensor is None else self._tensor
        self._tensor = None if last else tensor
        return tensor[rows]


def _converted(plan: _Plan, name: str) -> Tensor:
    rule, parts = plan.mapped[name]
    tensors = [plan.reader.read(part.name, part.entry) for part in parts]
    result = rule.functions.to_megatron(tensors, plan.geometry)
    assert tuple(result.shape) == plan.blueprint.shapes[name], name
    return result


def _initial(plan: _Plan, name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Matrices normal with Megatron's standard deviation, gains neutral, biases zero."""
    shape = plan.blueprint.shapes[name]
    if len(shape) == 1:
        # The norms of the vision part store their gains as they are.
        centred = plan.settings["layernorm_zero_centered_gamma"] and not name.startswith("vision_model.")
        neutral = 0.0 if centred or "bias" in name else 1.0
        return torch.full(shape, neutral, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def _flags(plan: _Plan, target: Path | None) -> str:
    flags = to_flags(plan.settings)
    if target is not None:
        tokenizer = str(target.absolute() / sidecar.FOLDER)
        flags += [["--tokenizer-type", "HuggingFaceTokenizer"], ["--tokenizer-model", tokenizer]]
    dtype = str(plan.dtype).removeprefix("torch.")
    head = f"# {plan.family.architecture}, converted; the weights are {dtype}. Source this file, then:\n"
    use = '#     pretrain_msa.py "${MODEL[@]}" --load THIS_FOLDER ...\n'
    return head + use + to_bash_array(flags)
