"""Segments: what attends to itself in the encoder, and what context-parallel ranks share out.

An image is one segment; a video is cut along time into segments of `vision_segment_frames` patches. Nothing
passes between segments before the language model: not in attention, and the merge is within one time. So they
are packed one behind the other without padding, and any rank may encode any of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.flops import forward_flops
from megatron_msa.model.vision.inputs import tokens_of_grid


@dataclass(frozen=True)
class Segment:
    """A box of patches: t x h x w.

    Attributes:
        start: its first patch among those of the microbatch.
        tokens: tokens of the language model that it becomes.
    """

    start: int
    t: int
    h: int
    w: int
    tokens: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


@dataclass
class PackedSegments(PackedSeqParams):
    """Segments laid end to end, for the layers of the encoder."""

    lengths: tuple[int, ...] = ()
    """Patches of each segment, on the host."""

    @classmethod
    def build(cls, segments: Sequence[Segment], device: torch.device) -> PackedSegments:
        lengths = tuple(segment.patches for segment in segments)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
        )


def cut_into_segments(grids: Sequence[Sequence[int]], config: VisionConfig) -> list[Segment]:
    """The segments of a microbatch, in the order of its patches.

    Args:
        grids: patches of each visual along time, height and width.
        config: of the encoder.

    Raises:
        ConfigError: a grid that does not divide into merge blocks.
    """
    segments, start = [], 0
    for t, h, w in grids:
        step = config.vision_segment_frames or t
        tokens_of_grid((t, h, w), config.vision_merge_size)
        for first in range(0, t, step):
            frames = min(step, t - first)
            tokens = tokens_of_grid((frames, h, w), config.vision_merge_size)
            segments.append(Segment(start, frames, h, w, tokens))
            start += segments[-1].patches
    return segments


def deal(segments: Sequence[Segment], config: VisionConfig, hidden_size: int, ranks: int) -> list[int]:
    """The rank that encodes each segment: the largest first, each to the rank with the least work so far.

    The work is the floating-point operations of the forward pass. No rank gets more than the mean and one
    segment. Every rank computes the same answer.
    """
    work = [forward_flops(config, hidden_size, [segment.patches]) for segment in segments]
    least = [(0.0, rank) for rank in range(ranks)]
    owner = [0] * len(segments)
    for number in sorted(range(len(segments)), key=lambda number: -work[number]):
        load, rank = heapq.heappop(least)
        owner[number] = rank
        heapq.heappush(least, (load + work[number], rank))
    return owner
