"""Looks into a checkpoint on disk before training starts: is it one that this model can continue from?"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError

_INDEX_KEY = "self_attention.index_branch."
_EMBEDDING_KEY = "embedding.word_embeddings.weight"


def find_checkpoint(load: str, step: int | None = None) -> Path | None:
    """The folder of the checkpoint that Megatron would load from ``load``, or None when there is none."""
    root = Path(load)
    tracker = root / "latest_checkpointed_iteration.txt"
    if step is not None:
        name = f"iter_{step:07d}"
    elif tracker.is_file():
        text = tracker.read_text().strip()
        name = "release" if text == "release" else f"iter_{int(text):07d}"
    else:
        return None
    return root / name


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
            f"{checkpoint} is not a complete torch_dist checkpoint ({type(error).__name__}: {error}); choose another "
            "step with --ckpt-step, or another --load"
        ) from error
    return {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }


def check_checkpoint(args: argparse.Namespace, config: MSATransformerConfig, vocab_size: int) -> None:
    """Refuse a checkpoint without the index branch this model needs, or with another vocabulary.

    Args:
        args: reads ``load``, ``ckpt_step`` and ``pretrained_checkpoint``.
        vocab_size: padded vocabulary size of the model.

    Raises:
        ConfigError: the checkpoint does not fit; says how to convert.
    """
    for load in (args.load, getattr(args, "pretrained_checkpoint", None)):
        checkpoint = find_checkpoint(load, getattr(args, "ckpt_step", None)) if load else None
        if checkpoint is None or not (checkpoint / ".metadata").exists():
            continue  # nothing there, or another format: Megatron reports it
        shapes = tensor_shapes(checkpoint)
        if any(config.msa_layer_pattern()) and not any(_INDEX_KEY in name for name in shapes):
            raise ConfigError(
                f"the checkpoint {checkpoint} has no index branch: it is a dense model. Convert it from GQA to MSA "
                "first, or train it as it is with --msa-layer-freq "
                f"'([0]*{config.num_layers})'"
            )
        embedding = shapes.get(_EMBEDDING_KEY)
        if embedding is not None and embedding[0] != vocab_size:
            raise ConfigError(
                f"vocabulary mismatch: the checkpoint {checkpoint} has {embedding[0]} embeddings, the model "
                f"{vocab_size} (tokenizer vocabulary padded to --make-vocab-size-divisible-by times TP); use the "
                "tokenizer the checkpoint was trained with"
            )
