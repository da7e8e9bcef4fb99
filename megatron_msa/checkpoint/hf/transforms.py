"""The named transforms of the mapping tables: one Megatron tensor <-> one or more Hugging Face tensors.

Each is a pair of functions that undo each other exactly (`gain`, where gains are stored differently, up to
fp32 rounding). They also run on tensors of device "meta": that is how shapes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What the transforms must know of a model."""

    heads: int
    groups: int
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face vocabulary."""
    padded_vocab_size: int
    """Rows of Megatron's, padding included."""
    vision_heads: int = 0
    """Attention heads of the vision encoder."""
    patch_kernel: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Channels, frames, height and width of a patch."""
    gain_shift: int = 0
    """Megatron's gain minus Hugging Face's: -1 where only Megatron stores gains around zero, +1 where only
    Hugging Face does, 0 where both agree."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], vocab_size: int, gain_shift: int = 0) -> Geometry:
        """From the settings of a model (see `settings`)."""
        names = ("num_channels", "temporal_patch_size", "patch_size", "patch_size")
        channels, frames, height, width = (settings[f"vision_{name}"] for name in names)
        return cls(
            heads=settings["num_attention_heads"],
            groups=settings["num_query_groups"],
            head_dim=settings["kv_channels"],
            vocab_size=vocab_size,
            padded_vocab_size=settings["padded_vocab_size"],
            vision_heads=settings["vision_num_attention_heads"],
            patch_kernel=(channels, frames, height, width),
            gain_shift=gain_shift,
        )


@dataclass(frozen=True)
class Transform:
    """Both directions of a named transform."""

    to_megatron: Callable[[list[Tensor], Geometry], Tensor]
    to_hf: Callable[[Tensor, Geometry], list[Tensor]]


def _merge_qkv(parts: list[Tensor], geometry: Geometry) -> Tensor:
    """q, k, v [heads of each * head_dim, hidden] -> per GQA group its query heads, its key, its value."""
    grouped = [part.reshape(geometry.groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, geometry: Geometry) -> list[Tensor]:
    grouped = tensor.reshape(geometry.groups, -1, *tensor.shape[1:])
    query_rows = geometry.heads // geometry.groups * geometry.head_dim
    parts = grouped.split([query_rows, geometry.head_dim, geometry.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _merge_vision_qkv(parts: list[Tensor], geometry: Geometry) -> Tensor:
    """q, k, v [heads * head_dim, ...] -> per head its query, key and value; weights and biases alike."""
    grouped = [part.reshape(geometry.vision_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_vision_qkv(tensor: Tensor, geometry: Geometry) -> list[Tensor]:
    grouped = tensor.reshape(geometry.vision_heads, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.chunk(3, dim=1)]


def _pad_vocabulary(parts: list[Tensor], geometry: Geometry) -> Tensor:
    (tensor,) = parts
    rows = geometry.padded_vocab_size - geometry.vocab_size
    return tensor if rows == 0 else torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def _shifted(tensor: Tensor, shift: int) -> Tensor:
    """``tensor + shift`` in fp32: bf16 would round a gain of 1.001 to 1. No shift, no change."""
    return tensor if shift == 0 else tensor.float() + shift


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(lambda parts, _: parts[0], lambda tensor, _: [tensor]),
    # Gate and up projection: Megatron computes both with one matrix, gate rows first.
    "rows": Transform(lambda parts, _: torch.cat(parts), lambda tensor, _: list(tensor.chunk(2))),
    "qkv": Transform(_merge_qkv, _split_qkv),
    "vision_qkv": Transform(_merge_vision_qkv, _split_vision_qkv),
    # A convolution whose stride is its kernel <-> a matrix.
    "patch_kernel": Transform(
        lambda parts, _: parts[0].flatten(1),
        lambda tensor, geometry: [tensor.reshape(-1, *geometry.patch_kernel)],
    ),
    "gain": Transform(
        lambda parts, geometry: _shifted(parts[0], geometry.gain_shift),
        lambda tensor, geometry: [_shifted(tensor, -geometry.gain_shift)],
    ),
    "vocabulary": Transform(_pad_vocabulary, lambda tensor, geometry: [tensor[: geometry.vocab_size]]),
}
