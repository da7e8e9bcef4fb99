"""Index scores of the new tokens, reduced to one maximum per query, group and cached block.

Letters in shapes: S sequences, R rows of a sequence (row = query * groups + group, the order in which
index_query lies in memory), N most blocks of a sequence, B block size, d_i index head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT_BITS = tl.constexpr(0x7F800000)
LARGEST_POWER = tl.constexpr(2.0**14)


@triton.jit
def _in_fp16(q):
    """q [rows, d_i] in fp16, each row times a power of two that brings its largest entry to 2^14 .. 2^15.

    A positive factor per row changes no ranking. fp16 then holds all bits of a bf16 number down to 2^-31 of
    the row's largest, and what it loses of smaller ones is far below a rounding of the fp32 sums. fp16 is the
    type to which Hopper turns 8-bit numbers in one instruction.
    """
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), axis=1)
    power = (largest.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    is_ordinary = (power > 0.0) & (power < float("inf"))
    return (q / tl.where(is_ordinary, power, LARGEST_POWER)[:, None] * LARGEST_POWER).to(tl.float16)


@triton.jit(
    do_not_specialize=["max_blocks", "segment_blocks"],
    do_not_specialize_on_alignment=["page_table", "lengths"],
)
def decode_scores_kernel(
    index_query,
    index_keys,
    key_scale,
    page_table,
    lengths,
    block_max,
    max_blocks,
    segment_blocks,
    SEQUENCE_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program reduces the blocks of one segment (grid axis 0) of one sequence (1) for ROWS rows (2).

    Blocks before the one that holds the last token are whole and visible to every query that may choose them
    (the others have a lower local block, and their top-k leaves the rest out), and the last one competes for
    nobody: so nothing is masked, and rows of the cache without a token are never read.

    Args:
        index_query: [S, R, d_i].
        index_keys: tensor descriptor of [pages * B, d_i], blocks of [B, d_i].
        key_scale: fp32 [pages * B], the scales of 8-bit keys; None for other keys.
        page_table: int32 [S, N].
        lengths: int32 [S].
        block_max: fp32 [S, R, N]: the largest score of a token, NaN as -inf, written for every block before
            the one that holds the last token. Of 8-bit keys: times a positive number per row.
        max_blocks: N.
        segment_blocks: blocks per program.
        SEQUENCE_ROWS: R.
        DIM: d_i.
        BLOCK: B.
        ROWS: rows per program.
        STAGES: blocks in flight.
        UPCAST: multiply in fp32, for Triton's interpreter, which cannot multiply 16-bit numbers.
    """
    sequence = tl.program_id(1)
    num_blocks = tl.maximum(tl.load(lengths + sequence) - 1, 0) // BLOCK
    begin = tl.program_id(0) * segment_blocks
    if begin >= num_blocks:
        return
    end = tl.minimum(begin + segment_blocks, num_blocks)

    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists = row < SEQUENCE_ROWS
    row += sequence * SEQUENCE_ROWS
    feature = tl.arange(0, DIM)
    q = tl.load(index_query + row[:, None] * DIM + feature[None, :], mask=exists[:, None], other=0.0)
    if key_scale is not None:
        q = _in_fp16(q)
    if UPCAST:
        q = q.to(tl.float32)
    page_table += sequence.to(tl.int64) * max_blocks
    place = block_max + row.to(tl.int64) * max_blocks

    # A step ahead: with the look-up inside the step, the compiler spends half of its stages on it.
    page = tl.load(page_table + begin)
    for block in tl.range(begin, end, num_stages=STAGES):
        first_key = page * BLOCK
        page = tl.load(page_table + tl.minimum(block + 1, end - 1))
        # Keys are the rows of the product: the tensor cores want 64 of them, and there are few queries.
        k = index_keys.load([first_key, 0]).to(q.dtype)
        scores = tl.dot(k, tl.trans(q))  # [B, ROWS]
        if key_scale is not None:
            scores *= tl.load(key_scale + first_key + tl.arange(0, BLOCK))[:, None]
        best = tl.max(tl.where(scores == scores, scores, float("-inf")), axis=0)
        tl.store(place + block, best, mask=exists)
