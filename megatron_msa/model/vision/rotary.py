"""Rotary angles of the patches: every axis turns its own channels of a head.

With A axes a head of d channels has d_A = 2 floor(d / 2A) channels for each; angle i of an axis is
position * base^(-2i / d_A). The angles of all axes stand side by side in the first half of the turned
channels and again in the second half, and what is left of the head is not turned (MiniMax-M3: d 80, three
axes of 26, 2 left over).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.segments import Segment


def patch_positions(segment: Segment, merge: int) -> dict[str, Tensor]:
    """Time, row and column of each patch of a segment, int64 [patches], in the order of `inputs`."""
    t, h, w = torch.meshgrid(
        torch.arange(segment.t), torch.arange(segment.h), torch.arange(segment.w), indexing="ij"
    )
    blocks = (segment.t, segment.h // merge, merge, segment.w // merge, merge)
    return {
        axis: values.reshape(blocks).transpose(2, 3).flatten()
        for axis, values in (("t", t), ("h", h), ("w", w))
    }


def rotary_angles(segments: Sequence[Segment], config: VisionConfig, device: torch.device) -> Tensor:
    """Angles as Megatron's rotary functions take them: fp32 [patches of all segments, 1, 1, turned channels].

    Args:
        segments: laid end to end; positions start anew in each.
        config: of the encoder.
        device: of the result.
    """
    dims = config.rotary_dims_per_axis
    frequencies = config.vision_rope_base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    rows = []
    known: dict[tuple[int, int, int], Tensor] = {}  # images of one size have the same positions
    for segment in segments:
        size = (segment.t, segment.h, segment.w)
        if size not in known:
            positions = patch_positions(segment, config.vision_merge_size)
            known[size] = torch.stack([positions[axis] for axis in config.vision_rope_axes], dim=1)
        rows.append(known[size])
    positions = torch.cat(rows).to(device, non_blocking=True)  # [patches, axes]
    angles = (positions[:, :, None] * frequencies.to(device)).flatten(1)
    return torch.cat([angles, angles], dim=1)[:, None, None, :]
