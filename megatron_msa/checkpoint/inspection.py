"""Looks into a checkpoint on disk before training starts: is it one that this model can continue from?"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError

# One tensor per layer, or in an older format all layers stacked in one.
_INDEX_WEIGHT = re.compile(
    r"decoder\.layers\.((?P<layer>\d+)\.)?self_attention\.index_branch\.linear_index_k\.weight"
)
_EXTENSIBLE = "fully_reshardable"  # of the distributed optimizer; others keep a state per parameter anyway
_EMBEDDING_KEY = "embedding.word_embeddings.weight"


def find_checkpoint(load: str | None, step: int | None = None) -> Path | None:
    """The folder of the checkpoint that Megatron would load from ``load``, or None when there is none.

    Args:
        load: --load or --pretrained-checkpoint.
        step: --ckpt-step.

    Raises:
        ConfigError: the file that names the latest checkpoint cannot be understood, or names a missing one.
    """
    if load is None:
        return None
    root = Path(load)
    tracker = root / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not step and text != "release" and not text.isdecimal():
        raise ConfigError(
            f"{tracker} holds {text!r} where an iteration is expected; choose one with --ckpt-step"
        )
    checkpoint = root / ("release" if text == "release" and not step else f"iter_{step or int(text):07d}")
    if not checkpoint.is_dir():
        chosen = "chosen with --ckpt-step" if step else f"named by {tracker}"
        raise ConfigError(
            f"the checkpoint {checkpoint}, {chosen}, does not exist; choose another --ckpt-step"
        )
    return checkpoint


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of a torch_dist checkpoint, from its metadata alone.

    Raises:
        ConfigError: there is no readable metadata.
    """
    from torch.distributed.checkpoint import FileSystemReader

    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except Exception as error:
        raise ConfigError(
            f"{checkpoint} is not a complete torch_dist checkpoint ({type(error).__name__}: {error}); "
            "choose another step with --ckpt-step, or another --load"
        ) from error
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }


def check_checkpoint(args: argparse.Namespace, config: MSATransformerConfig, vocab_size: int) -> None:
    """Refuse a checkpoint without the index branches this model needs, or with another vocabulary.

    Args:
        args: reads ``load``, ``ckpt_step``, ``pretrained_checkpoint``, ``msa_init_index``, ``finetune`` and
            ``no_load_optim``, ``skip_train``.
        vocab_size: padded vocabulary size of the model.

    Raises:
        ConfigError: the checkpoint does not fit; says how to convert.
    """
    # As in Megatron: the pretrained checkpoint starts a run, until the run has a checkpoint of its own.
    own = find_checkpoint(args.load, args.ckpt_step)
    checkpoint = own or find_checkpoint(args.pretrained_checkpoint, args.ckpt_step)
    initialises = args.msa_init_index is not None
    if initialises and checkpoint is None:
        raise ConfigError(
            f"--msa-init-index is set, but there is no checkpoint in --load {args.load}: its index branches "
            "would belong to a random model; correct --load, or leave the flag out to train from scratch"
        )
    if checkpoint is None or any(checkpoint.glob("mp_rank_*")):
        return  # nothing to load, or Megatron's older format, which has no metadata to look into
    shapes = tensor_shapes(checkpoint)
    missing = _layers_without_index_branch(shapes, config)
    if missing and not initialises:
        _refuse_missing(checkpoint, missing, config)
    loads_optimizer = own is not None and own.name != "release" and not args.finetune
    if loads_optimizer and not (args.no_load_optim or args.skip_train):
        if not any("optimizer." in name for name in shapes):
            raise ConfigError(
                f"the checkpoint {checkpoint} has no optimizer state; add --no-load-optim to start with a "
                "new one"
            )
        if missing:
            check_extensible(checkpoint, "add --no-load-optim to start with a new optimizer")
    embedding = shapes.get(_EMBEDDING_KEY)
    if embedding is not None and embedding[0] != vocab_size:
        raise ConfigError(
            f"vocabulary mismatch: the checkpoint {checkpoint} has {embedding[0]} embeddings, the model "
            f"{vocab_size} (tokenizer vocabulary padded to --make-vocab-size-divisible-by times TP); use "
            "the tokenizer the checkpoint was trained with"
        )


def check_extensible(checkpoint: Path, otherwise: str) -> None:
    """Refuse a checkpoint to whose optimizer state no parameters can be added.

    Args:
        checkpoint: folder of one torch_dist checkpoint.
        otherwise: how to do without the optimizer state.

    Raises:
        ConfigError: says how to get a checkpoint in another format.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    metadata = load_common_state_dict(str(checkpoint)).get("content_metadata") or {}
    kind = metadata.get("distrib_optim_sharding_type", _EXTENSIBLE)
    if kind != _EXTENSIBLE:
        raise ConfigError(
            f"the checkpoint {checkpoint} has the state of the distributed optimizer in the format {kind}: "
            "flat buffers of this model's parameters, to which those of an index branch cannot be added. "
            "Either continue the dense run for one iteration with --dist-ckpt-optim-fully-reshardable and "
            f"use the checkpoint it saves, or {otherwise}"
        )


def _layers_without_index_branch(
    shapes: dict[str, tuple[int, ...]], config: MSATransformerConfig
) -> set[int]:
    """The MSA layers, counted from 0, for which the checkpoint has no index branch."""
    found: set[int] = set()
    for name, shape in shapes.items():
        match = _INDEX_WEIGHT.fullmatch(name)
        if match is not None:
            found |= {int(match["layer"])} if match["layer"] else set(range(shape[0]))
    return {layer for layer, is_msa in enumerate(config.msa_layer_pattern()) if is_msa} - found


def _refuse_missing(checkpoint: Path, missing: set[int], config: MSATransformerConfig) -> None:
    if len(missing) == sum(config.msa_layer_pattern()):
        raise ConfigError(
            f"the checkpoint {checkpoint} has no index branch: it is a dense model. Add --msa-init-index to "
            "initialise it on loading, convert the checkpoint with tools/convert_checkpoint.py gqa-to-msa, "
            f"or train it as it is with --msa-layer-freq '([0]*{config.num_layers})'"
        )
    layers = ", ".join(str(layer + 1) for layer in sorted(missing))
    raise ConfigError(
        f"the checkpoint {checkpoint} has no index branch in layer {layers} (counted from 1), which "
        "--msa-layer-freq makes an MSA layer; use the pattern the checkpoint was trained with, or add "
        "--msa-init-index to initialise what is missing"
    )
