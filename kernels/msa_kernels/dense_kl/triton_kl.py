"""KL of the index branch from the attention over all visible tokens: its value.

Letters in shapes: Q queries, K keys, Hq query heads, Hkv groups, d head dim, d_i index head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.dense_kl.triton_queries import (
    LOG2E,
    SortedQueries,
    load_intervals,
    rows_of_heads,
    sees,
    some_see,
)
from msa_kernels.dense_kl.triton_teacher import add_mean_probabilities

# Query positions and keys of a tile, and how the compiler runs it. Several programs of four warps share a
# multiprocessor, so that one's exponentials run beside another's products.
TILE = {"ROWS": 64, "KEYS": 128, "STAGES": 2, "num_warps": 4, "maxnreg": 168}
# With the entropy of every head a second tile is summed up in registers.
TILE_WITH_ENTROPY = {"ROWS": 64, "KEYS": 128, "STAGES": 2, "num_warps": 4}
COMBINE_ROWS = 128
# Keys that one program works through: more spares partial results, fewer share out a long row better.
MIN_SEGMENT_KEYS = 512
MAX_SEGMENTS = 64


# A score of a hidden key: finite, so that 0 times it is 0, and its exponential is 0 beside any visible one.
HIDDEN = tl.constexpr(-1e30)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _log2(x):
    """Base-2 logarithm by the hardware's approximation, within 2^-22; tl.log2 takes 20 instructions."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit(do_not_specialize=["num_queries", "tiles_per_segment"])
def _kl_kernel(
    q, k, lse, index_q, index_k, first_keys, last_keys, partial_divergence, partial_lse,
    num_queries, tiles_per_segment, scale_log2, index_scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, INDEX_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PER_HEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per segment of the keys, tile of places and group. Over the segment's visible keys, with z
    the index scores in units of log2, writes for every place, both fp32 [segments, Hkv, Q]:

    partial_divergence = sum_j P log2 P - sum_j P z  (PER_HEAD: the mean over h of sum_j P_h log2 P_h first)
    partial_lse        = log2 sum_j 2^z

    q, k, index_q and index_k are tensor descriptors, see ``rows_of_heads``.
    """
    GROUPS: tl.constexpr = HEADS // GROUP
    segment, group = tl.program_id(0), tl.program_id(2)
    # The last tiles see the most keys: they start first.
    first_place = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    place = first_place + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    max_first_key, min_last_key = tl.max(first_key, 0), tl.min(last_key, 0)
    begin = tl.maximum(segment * tiles_per_segment, tl.min(first_key, 0) // KEYS)
    end = tl.minimum((segment + 1) * tiles_per_segment, tl.max(last_key, 0) // KEYS + 1)
    if begin >= end:
        return
    divergence = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], HIDDEN, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for key_tile_number in tl.range(begin, end):
        begin_key = key_tile_number * KEYS
        end_key = begin_key + KEYS
        if some_see(begin_key, end_key, first_key, last_key):
            key_tile = k.load([begin_key, group * DIM])
            p, p_log_p = add_mean_probabilities(
                tl.zeros([ROWS, KEYS], dtype=tl.float32), q, lse, first_place, key_tile, group, num_queries,
                scale_log2, HEADS, GROUP, DIM, ROWS, PER_HEAD, STAGES,
            )  # fmt: skip
            index_q_tile = index_q.load([first_place, group * INDEX_DIM])
            index_key_tile = index_k.load([begin_key, 0])
            z = tl.dot(index_q_tile, tl.trans(index_key_tile)) * index_scale_log2
            if (max_first_key > begin_key) | (min_last_key < end_key - 1):
                visible = sees(begin_key + tl.arange(0, KEYS), first_key, last_key)
                z = tl.where(visible, z, HIDDEN)
                p = tl.where(visible, p, 0.0)
                p_log_p = tl.where(visible, p_log_p, 0.0)
            if PER_HEAD:
                terms = p_log_p - p * z
            else:
                terms = p * (_log2(tl.maximum(p, 1e-37)) - z)
            divergence += tl.sum(terms, 1)
            # What a row counts before it has seen anything, at a top of HIDDEN, vanishes with the first key.
            new_top = tl.maximum(top, tl.max(z, 1))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top[:, None]), 1)
            top = new_top
    inside = place < num_queries
    offset = (segment * GROUPS + group).to(tl.int64) * num_queries + place
    tl.store(partial_divergence + offset, divergence, mask=inside)
    tl.store(partial_lse + offset, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "segment_keys"])
def _combine_kernel(
    partial_divergence, partial_lse, first_keys, last_keys, kl, index_lse, num_queries, segment_keys,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """kl and index_lse, both [Q, Hkv] in nats, from the segments that hold keys visible to each query."""
    group = tl.program_id(1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    first_segment, last_segment = first_key // segment_keys, last_key // segment_keys
    divergence = tl.zeros([ROWS], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    inside = place < num_queries
    for segment in tl.range(tl.min(first_segment, 0), tl.max(last_segment, 0) + 1):
        written = inside & (first_segment <= segment) & (segment <= last_segment)
        offset = (segment * GROUPS + group).to(tl.int64) * num_queries + place
        divergence += tl.load(partial_divergence + offset, mask=written, other=0.0)
        segment_lse = tl.load(partial_lse + offset, mask=written, other=float("-inf"))
        new_top = tl.maximum(top, segment_lse)
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        total = total * tl.exp2(top - base) + tl.exp2(segment_lse - base)
        top = new_top
    lse = top + tl.log2(total)
    row = place.to(tl.int64) * GROUPS + group
    tl.store(kl + row, (divergence + lse) * 0.6931471805599453, mask=inside)
    tl.store(index_lse + row, lse * 0.6931471805599453, mask=inside)


def tiles_per_segment(num_keys: int, tile_keys: int, min_segment_keys: int) -> int:
    """Key tiles per segment: at least ``min_segment_keys`` keys, and at most MAX_SEGMENTS segments."""
    tiles = triton.cdiv(num_keys, tile_keys)
    return max(min_segment_keys // tile_keys, triton.cdiv(tiles, MAX_SEGMENTS))


def divergence(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    queries: SortedQueries,
    *,
    softmax_scale: float,
    index_softmax_scale: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """KL of the student from the teacher.

    Args:
        q: [Q, Hq, d]; everything here by place, contiguous and aligned. Q is 1 or more.
        k: [K, Hkv, d].
        lse: fp32 [Q, Hq], natural log, of the attention over all visible keys.
        index_q: [Q, Hkv, d_i].
        index_k: [K, d_i].
        queries: the Q queries.
        softmax_scale: factor on the scores.
        index_softmax_scale: factor on the index scores.
        per_head: the mean over the heads of KL(P_h || S) instead of KL(P || S).

    Returns:
        kl and the student's logsumexp over the visible keys, both fp32 [Q, Hkv], in nats.
    """
    num_queries, heads, dim = q.shape
    num_keys, groups, _ = k.shape
    tile: dict = TILE_WITH_ENTROPY if per_head else TILE
    segment_tiles = tiles_per_segment(num_keys, tile["KEYS"], MIN_SEGMENT_KEYS)
    segments = triton.cdiv(num_keys, segment_tiles * tile["KEYS"])
    # Separate buffers: kernels are compiled for the alignment of their pointers, and the second half of one
    # buffer would have an alignment that depends on the number of queries.
    partial_divergence, partial_lse = (lse.new_empty(segments, groups, num_queries) for _ in range(2))
    _kl_kernel[(segments, triton.cdiv(num_queries, tile["ROWS"]), groups)](
        rows_of_heads(q, tile["ROWS"]), rows_of_heads(k, tile["KEYS"]), lse,
        rows_of_heads(index_q, tile["ROWS"]), rows_of_heads(index_k, tile["KEYS"]),
        queries.first_key, queries.last_key, partial_divergence, partial_lse,
        num_queries, segment_tiles, softmax_scale * LOG2E, index_softmax_scale * LOG2E,
        HEADS=heads, GROUP=heads // groups, DIM=dim, INDEX_DIM=index_q.shape[2], PER_HEAD=per_head, **tile,
    )  # fmt: skip
    kl, index_lse = (lse.new_empty(num_queries, groups) for _ in range(2))
    _combine_kernel[(triton.cdiv(num_queries, COMBINE_ROWS), groups)](
        partial_divergence, partial_lse, queries.first_key, queries.last_key, kl, index_lse,
        num_queries, segment_tiles * tile["KEYS"], GROUPS=groups, ROWS=COMBINE_ROWS, num_warps=4,
    )  # fmt: skip
    return kl, index_lse
