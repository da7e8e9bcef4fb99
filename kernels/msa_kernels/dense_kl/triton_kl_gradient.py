"""KL of the index branch from the attention over all visible tokens: its gradient.

With z the scaled index scores, d kl / dz = S - P. One kernel writes it down, times the upstream gradient and
in 16 bit; two more multiply it with index_k and with index_q. Chunks of the queries keep that buffer small.

Letters in shapes: Q queries, K keys, Hq query heads, Hkv groups, d head dim, d_i index head dim, C places of
a chunk, W columns of the buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.dense_kl.triton_kl import tiles_per_segment
from msa_kernels.dense_kl.triton_queries import (
    LOG2E,
    SortedQueries,
    load_intervals,
    rows_of_heads,
    sees,
    some_see,
)
from msa_kernels.dense_kl.triton_teacher import add_mean_probabilities

# Budget of the buffer that holds d kl / dz of a chunk of queries.
MAX_BUFFER_BYTES = 2**30
# Query positions and keys of a tile: the kernels walk through the same tiles.
ROWS = 64
KEYS = 128
# One stage outside the loop over the heads: another would take the shared memory of the third program.
SCORE_SETTINGS = {"STAGES": 2, "num_warps": 4, "maxnreg": 168, "num_stages": 1}
PRODUCT_SETTINGS = {"STAGES": 3, "num_warps": 4}
COMBINE_ROWS = 16
# Keys that one program of the first, or the second, kernel works through.
SCORE_SEGMENT_KEYS = 256
QUERY_SEGMENT_KEYS = 4096
# |S - P| is far below 1 in long rows, and upstream gradients are brought to at most 1: this keeps their
# products in fp16's normal range, and its largest value below fp16's maximum.
LIFT = 2.0**12


@triton.jit(do_not_specialize=["num_queries", "tiles_per_segment", "begin_place", "chunk"])
def _score_gradient_kernel(
    q, k, lse, index_q, index_k, index_lse, dkl, first_keys, last_keys, dz,
    num_queries, tiles_per_segment, begin_place, chunk, scale_log2, index_scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, INDEX_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per segment of the keys, tile of the chunk's places and group.

    dz [Hkv, C, W] = dkl (S - P). A tile of places begins its rows of dz with the key tile in which its first
    visible key lies. Tiles in which some place sees some key are written, with 0 for hidden keys; others not.
    q, k, index_q, index_k and dz are tensor descriptors, see ``rows_of_heads``.
    """
    GROUPS: tl.constexpr = HEADS // GROUP
    segment, group = tl.program_id(0), tl.program_id(2)
    # The last tiles see the most keys: they start first.
    place_in_chunk = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    first_place = begin_place + place_in_chunk
    place = first_place + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    max_first_key, min_last_key = tl.max(first_key, 0), tl.min(last_key, 0)
    first_tile = tl.min(first_key, 0) // KEYS
    begin = tl.maximum(segment * tiles_per_segment, first_tile)
    end = tl.minimum((segment + 1) * tiles_per_segment, tl.max(last_key, 0) // KEYS + 1)
    if begin >= end:
        return
    row = place.to(tl.int64) * GROUPS + group
    inside = place < num_queries
    index_lse_log2 = tl.load(index_lse + row, mask=inside, other=0.0) * 1.4426950408889634
    weight = -tl.load(dkl + row, mask=inside, other=0.0)
    for key_tile_number in tl.range(begin, end):
        begin_key = key_tile_number * KEYS
        end_key = begin_key + KEYS
        if some_see(begin_key, end_key, first_key, last_key):
            index_q_tile = index_q.load([first_place, group * INDEX_DIM])
            z = tl.dot(index_q_tile, tl.trans(index_k.load([begin_key, 0]))) * index_scale_log2
            # P is added to -S, so that one tile less has to be kept while the heads pass.
            difference, _ = add_mean_probabilities(
                -tl.exp2(z - index_lse_log2[:, None]), q, lse, first_place, k.load([begin_key, group * DIM]),
                group, num_queries, scale_log2, HEADS, GROUP, DIM, ROWS, False, STAGES,
            )  # fmt: skip
            if (max_first_key > begin_key) | (min_last_key < end_key - 1):
                visible = sees(begin_key + tl.arange(0, KEYS), first_key, last_key)
                difference = tl.where(visible, difference, 0.0)
            gradient = (difference * weight[:, None]).to(dz.dtype)
            dz.store([group * chunk + place_in_chunk, (key_tile_number - first_tile) * KEYS], gradient)


@triton.jit(do_not_specialize=["num_queries", "tiles_per_segment", "begin_place", "chunk"])
def _query_gradient_kernel(
    index_k, dz, first_keys, last_keys, partial_dq, num_queries, tiles_per_segment, begin_place, chunk,
    GROUPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per segment of the keys, tile of the chunk's places and group.

    partial_dq fp32 [segments, Hkv, C, d_i] = dz index_k over the segment.
    """
    segment, group = tl.program_id(0), tl.program_id(2)
    place_in_chunk = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    place = place_in_chunk + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, begin_place + place, num_queries)
    first_tile = tl.min(first_key, 0) // KEYS
    begin = tl.maximum(segment * tiles_per_segment, first_tile)
    end = tl.minimum((segment + 1) * tiles_per_segment, tl.max(last_key, 0) // KEYS + 1)
    if begin >= end:
        return
    total = tl.zeros([ROWS, DIM], dtype=tl.float32)
    if tl.min(first_key, 0) == tl.max(first_key, 0):
        for tile in tl.range(begin, end, num_stages=STAGES):
            gradient = dz.load([group * chunk + place_in_chunk, (tile - first_tile) * KEYS])
            total = tl.dot(gradient, index_k.load([tile * KEYS, 0]), total)
    else:
        for tile in tl.range(begin, end):
            if some_see(tile * KEYS, tile * KEYS + KEYS, first_key, last_key):
                gradient = dz.load([group * chunk + place_in_chunk, (tile - first_tile) * KEYS])
                total = tl.dot(gradient, index_k.load([tile * KEYS, 0]), total)
    row = (segment * GROUPS + group).to(tl.int64) * chunk + place
    tl.store(partial_dq + row[:, None] * DIM + tl.arange(0, DIM)[None, :], total)


@triton.jit(do_not_specialize=["num_queries", "segment_keys", "begin_place", "chunk"])
def _combine_kernel(
    partial_dq, first_keys, last_keys, dq, factor, num_queries, segment_keys, begin_place, chunk,
    GROUPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq [Q, Hkv, d_i] = factor * the ordered sum of partial_dq over the segments with visible keys."""
    group = tl.program_id(1)
    place_in_chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = begin_place + place_in_chunk
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    first_segment, last_segment = first_key // segment_keys, last_key // segment_keys
    inside = (place < num_queries) & (place_in_chunk < chunk)
    dims = tl.arange(0, DIM)
    total = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for segment in tl.range(tl.min(first_segment, 0), tl.max(last_segment, 0) + 1):
        written = inside & (first_segment <= segment) & (segment <= last_segment)
        row = (segment * GROUPS + group).to(tl.int64) * chunk + place_in_chunk
        pointers = partial_dq + row[:, None] * DIM + dims[None, :]
        total += tl.load(pointers, mask=written[:, None], other=0.0)
    pointers = dq + (place.to(tl.int64) * GROUPS + group)[:, None] * DIM + dims[None, :]
    tl.store(pointers, (total * tl.load(factor)).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["num_queries", "num_keys", "begin_place", "chunk"])
def _key_gradient_kernel(
    index_q, dz, first_keys, first_places, end_places, dk, num_queries, num_keys, begin_place, chunk,
    GROUPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per key tile and group: dk, fp32 [K, Hkv, d_i], gets the chunk's dz^T index_q added.

    The places that see some key of the tile are first_places .. end_places, both int32 [key tiles].
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    first_place = tl.maximum(tl.load(first_places + tile), begin_place)
    end_place = tl.minimum(tl.load(end_places + tile), tl.minimum(begin_place + chunk, num_queries))
    if first_place >= end_place:
        return
    # Whole tiles of places: each has one that sees a key of this tile, so that it has been written.
    begin = (first_place - begin_place) // ROWS * ROWS
    total = tl.zeros([KEYS, DIM], dtype=tl.float32)
    for place_in_chunk in tl.range(begin, end_place - begin_place, ROWS, num_stages=STAGES):
        first_tile = tl.load(first_keys + begin_place + place_in_chunk) // KEYS
        gradient = dz.load([group * chunk + place_in_chunk, (tile - first_tile) * KEYS])
        index_q_tile = index_q.load([begin_place + place_in_chunk, group * DIM])
        total = tl.dot(tl.trans(gradient), index_q_tile, total)
    key = tile * KEYS + tl.arange(0, KEYS)
    row = key.to(tl.int64) * GROUPS + group
    pointers = dk + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    in_keys = key[:, None] < num_keys
    tl.store(pointers, tl.load(pointers, mask=in_keys, other=0.0) + total, mask=in_keys)


def index_gradients(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_lse: Tensor,
    dkl: Tensor,
    queries: SortedQueries,
    max_document_length: int,
    *,
    softmax_scale: float,
    index_softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of kl for the index branch.

    Args:
        q: [Q, Hq, d]; everything here by place, contiguous and aligned. Q is 1 or more.
        k: [K, Hkv, d].
        lse: fp32 [Q, Hq], natural log.
        index_q: [Q, Hkv, d_i].
        index_k: [K, d_i].
        index_lse: fp32 [Q, Hkv], natural log.
        dkl: fp32 [Q, Hkv], upstream gradient.
        queries: the Q queries.
        max_document_length: upper bound of the keys that a query sees.
        softmax_scale: factor on the scores.
        index_softmax_scale: factor on the index scores.

    Returns:
        Gradients of index_q, by place, and of index_k, in their dtypes.
    """
    num_queries, heads, dim = q.shape
    num_keys, groups, _ = k.shape
    index_dim = index_k.shape[1]
    device = q.device

    # Upstream gradients may be as small as 1 / (tokens * groups), out of fp16's range.
    top = torch.cat([dkl.abs().flatten(), dkl.new_full((1,), 1e-30)]).max()
    weight = (dkl / top * LIFT).contiguous()
    factor = top * (index_softmax_scale / LIFT)

    key_tiles = triton.cdiv(num_keys, KEYS)
    width = key_tiles * KEYS
    if queries.order is None:
        # The queries of a tile are neighbouring keys: from the first one's document to the last of them.
        width = min(width, triton.cdiv(max_document_length + ROWS, KEYS) * KEYS + KEYS)
    row_bytes = groups * width * index_k.dtype.itemsize
    chunk = max(1, min(MAX_BUFFER_BYTES // row_bytes // ROWS, triton.cdiv(num_queries, ROWS))) * ROWS
    score_tiles = tiles_per_segment(num_keys, KEYS, SCORE_SEGMENT_KEYS)
    query_tiles = tiles_per_segment(num_keys, KEYS, QUERY_SEGMENT_KEYS)
    segments = triton.cdiv(key_tiles, query_tiles)

    edges = torch.arange(0, (key_tiles + 1) * KEYS, KEYS, dtype=torch.int32, device=device)
    first_places = torch.searchsorted(queries.last_key, edges[:-1], out_int32=True)
    end_places = torch.searchsorted(queries.first_key, edges[1:], out_int32=True)

    dz = torch.empty(groups * chunk, width, dtype=index_k.dtype, device=device)
    dz_tiles = TensorDescriptor.from_tensor(dz, [ROWS, KEYS])
    partial_dq = torch.empty(segments, groups, chunk, index_dim, dtype=torch.float32, device=device)
    dindex_q = torch.empty_like(index_q)
    dindex_k = torch.zeros(num_keys, groups, index_dim, dtype=torch.float32, device=device)
    q_rows, index_q_rows = rows_of_heads(q, ROWS), rows_of_heads(index_q, ROWS)
    k_rows, index_k_rows = rows_of_heads(k, KEYS), rows_of_heads(index_k, KEYS)
    intervals = (queries.first_key, queries.last_key)
    for begin in range(0, num_queries, chunk):
        count = min(chunk, num_queries - begin)
        place_tiles = triton.cdiv(count, ROWS)
        _score_gradient_kernel[(triton.cdiv(key_tiles, score_tiles), place_tiles, groups)](
            q_rows, k_rows, lse, index_q_rows, index_k_rows, index_lse, weight, *intervals, dz_tiles,
            num_queries, score_tiles, begin, chunk, softmax_scale * LOG2E, index_softmax_scale * LOG2E,
            HEADS=heads, GROUP=heads // groups, DIM=dim, INDEX_DIM=index_dim, ROWS=ROWS, KEYS=KEYS,
            **SCORE_SETTINGS,
        )  # fmt: skip
        _query_gradient_kernel[(segments, place_tiles, groups)](
            index_k_rows, dz_tiles, *intervals, partial_dq, num_queries, query_tiles, begin, chunk,
            GROUPS=groups, DIM=index_dim, ROWS=ROWS, KEYS=KEYS, **PRODUCT_SETTINGS,
        )  # fmt: skip
        _combine_kernel[(triton.cdiv(count, COMBINE_ROWS), groups)](
            partial_dq, *intervals, dindex_q, factor, num_queries, query_tiles * KEYS, begin, chunk,
            GROUPS=groups, DIM=index_dim, ROWS=COMBINE_ROWS, num_warps=4,
        )  # fmt: skip
        _key_gradient_kernel[(key_tiles, groups)](
            index_q_rows, dz_tiles, queries.first_key, first_places, end_places, dindex_k, num_queries,
            num_keys, begin, chunk, GROUPS=groups, DIM=index_dim, ROWS=ROWS, KEYS=KEYS, **PRODUCT_SETTINGS,
        )  # fmt: skip
    return dindex_q, (dindex_k.sum(dim=1) * factor).to(index_k.dtype)
