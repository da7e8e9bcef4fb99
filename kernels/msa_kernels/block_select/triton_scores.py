"""Index scores reduced to one maximum, and one logsumexp if wanted, per query, group and block.

Letters in shapes: Q queries, K keys, D documents, B block size, d_i index head dim, N blocks of the longest
document. A row is one query of one group: row = query * groups + group, the order in which index_q lies in
memory. All groups share index_k, so a tile of rows serves several groups of few positions from one read.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_DOCUMENT = tl.constexpr(2**31 - 1)


@triton.jit
def _scores(q, index_k, key_scale, start, end, block, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Raw scores of a tile of rows and one block, fp32 [TILE, B]."""
    # Past the document's end come other documents' keys, which no row sees, or zeros.
    k = index_k.load([start + block * BLOCK, 0])
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k))
    if key_scale is not None:
        key = start + block * BLOCK + tl.arange(0, BLOCK)
        scores *= tl.load(key_scale + key, mask=key < end, other=1.0)[None, :]
    return scores


@triton.jit
def _store_reduced(scores, block_max, block_lse, place, own, scale_log2):
    """Stores maximum and base-2 logsumexp of each row of ``scores``, where -inf marks hidden tokens.

    The maximum skips NaN (so that NaN ranks as -inf), the logsumexp keeps it.
    """
    best = tl.max(scores, axis=1)
    best = tl.where(best == best, best, float("-inf"))
    tl.store(block_max + place, best, mask=own)
    if block_lse is not None:
        # Infinite scores would give inf - inf; 0 keeps exp2 at the value that the logsumexp has to have.
        base = tl.where(tl.abs(best) == float("inf"), 0.0, best) * scale_log2
        total = tl.sum(tl.exp2(scores * scale_log2 - base[:, None]), axis=1)
        tl.store(block_lse + place, base + tl.log2(total), mask=own)


@triton.jit(
    do_not_specialize=["first_row", "end_row", "buffer_rows", "segment_blocks"],
    do_not_specialize_on_alignment=["document_offsets", "query_document", "query_position"],
)
def block_scores_kernel(
    index_q,
    index_k,
    key_scale,
    document_offsets,
    query_document,
    query_position,
    block_max,
    block_lse,
    first_row,
    end_row,
    buffer_rows,
    segment_blocks,
    scale_log2,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program reduces the blocks of one segment for one tile of rows.

    Writes, for every row and every block up to the row's local block, and maybe some blocks behind it:
    ``block_max[block, row - first_row]``, the largest raw score of a visible token, NaN as -inf, and, if
    wanted, ``block_lse[block, row - first_row]``, the base-2 logsumexp of the scaled scores of the visible
    tokens.

    Args:
        index_q: [Q * GROUPS, DIM], contiguous, bf16, fp16 or e4m3.
        index_k: tensor descriptor of [K, DIM], contiguous, the same dtype, read in pieces of [BLOCK, DIM].
        key_scale: fp32 [K], factor on the scores of each token; None for no factor.
        document_offsets: int32 [D + 1].
        query_document: int32 [Q].
        query_position: int32 [Q].
        block_max: fp32 [N, buffer_rows].
        block_lse: fp32 [N, buffer_rows], or None for maxima only.
        first_row: first row of this launch.
        end_row: the row behind the last one of this launch.
        buffer_rows: row capacity of the two buffers.
        segment_blocks: blocks per program along grid axis 1.
        scale_log2: softmax scale times log2(e).
        GROUPS: index query heads per query.
        DIM: d_i.
        BLOCK: B.
        TILE: rows per program, grid axis 0.
        STAGES: key blocks in flight.
        UPCAST: multiply in fp32, for Triton's interpreter, which cannot multiply bf16.
    """
    buffer_row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = first_row.to(tl.int64) + buffer_row
    in_range = row < end_row
    query = row // GROUPS
    document = tl.load(query_document + query, mask=in_range, other=-1)
    position = tl.load(query_position + query, mask=in_range, other=-1)
    local_block = tl.where(in_range, position // BLOCK, -1)

    segment_start = tl.program_id(1) * segment_blocks
    if tl.max(local_block, axis=0) < segment_start:
        return
    segment_end = segment_start + segment_blocks

    feature = tl.arange(0, DIM)
    q = tl.load(index_q + row[:, None] * DIM + feature[None, :], mask=in_range[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    token = tl.arange(0, BLOCK)
    # 64-bit addresses: the buffers and index_k may hold more than 2^31 elements.
    buffer_row = buffer_row.to(tl.int64)
    buffer_stride = buffer_rows.to(tl.int64)

    # A tile of neighbouring queries lies in one document nearly always; each further one is another round.
    current = tl.min(tl.where(in_range, document, NO_DOCUMENT), axis=0)
    while current != NO_DOCUMENT:
        own = document == current
        lowest_local = tl.min(tl.where(own, local_block, NO_DOCUMENT), axis=0)
        highest_local = tl.max(tl.where(own, local_block, -1), axis=0)
        start = tl.load(document_offsets + current)
        end = tl.load(document_offsets + current + 1)

        # Blocks before every row's local block are whole and visible to all rows of this document.
        for block in tl.range(segment_start, tl.minimum(lowest_local, segment_end), num_stages=STAGES):
            scores = _scores(q, index_k, key_scale, start, end, block, BLOCK, UPCAST)
            place = block * buffer_stride + buffer_row
            _store_reduced(scores, block_max, block_lse, place, own, scale_log2)

        first_masked = tl.maximum(lowest_local, segment_start)
        for block in tl.range(first_masked, tl.minimum(highest_local + 1, segment_end), num_stages=1):
            scores = _scores(q, index_k, key_scale, start, end, block, BLOCK, UPCAST)
            visible = (block * BLOCK + token)[None, :] <= position[:, None]
            place = block * buffer_stride + buffer_row
            scores = tl.where(visible, scores, float("-inf"))
            _store_reduced(scores, block_max, block_lse, place, own, scale_log2)

        # Rows out of range have document -1 and never come up.
        current = tl.min(tl.where(document > current, document, NO_DOCUMENT), axis=0)
