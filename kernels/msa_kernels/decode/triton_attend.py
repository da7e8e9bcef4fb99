"""Attention of new tokens over blocks of the cache: parts of the blocks, and the sum of the parts.

Letters in shapes: S sequences, q_len new tokens per sequence, Hq query heads, G heads per group, N most
blocks of a sequence, B block size, d head dim, P parts. A row is one query and head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _number_chosen(block_ids, SLOTS: tl.constexpr, PADDED_SLOTS: tl.constexpr):
    """Entries of a row of block ids before the padding."""
    slot = tl.arange(0, PADDED_SLOTS)
    chosen = tl.load(block_ids + slot, mask=slot < SLOTS, other=-1)
    return tl.sum((chosen >= 0).to(tl.int32), axis=0)


@triton.jit
def _block_at(block_ids, entry):
    """Block number of the entry-th block that is attended to; block_ids is None for all blocks."""
    if block_ids is None:
        block = entry
    else:
        block = tl.load(block_ids + entry)
    return block


@triton.jit(
    do_not_specialize=["max_blocks", "part_blocks", "num_parts"],
    do_not_specialize_on_alignment=["page_table", "lengths", "block_ids"],
)
def decode_attend_kernel(
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    page_table,
    lengths,
    block_ids,
    out,
    part_lse,
    max_blocks,
    part_blocks,
    num_parts,
    scale_log2,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program attends to one part (grid axis 0) of the blocks of one sequence and group (1) for a tile of
    neighbouring queries and all heads of the group (2).

    Scores and output are held transposed, [KEYS, ROWS] and [d, ROWS]: the tensor cores want 64 rows, and a
    group has at most 16 heads. Keys and values that no query of the tile sees are loaded as zeros: what the
    cache holds there, NaN maybe, stays out.

    Args:
        query: [S, q_len, Hq, d].
        key_cache: [pages, groups, B, d].
        value_cache: [pages, groups, B, d].
        key_scale: fp32 [pages, groups, B], None unless keys have 8 bits.
        value_scale: the same of values.
        page_table: int32 [S, N].
        lengths: int32 [S].
        block_ids: int32 [S, q_len, groups, SLOTS]; None for all visible blocks.
        out: [S, q_len, Hq, d], written; with part_lse fp32 [S, q_len, Hq, P, d], written for the parts that
            have blocks.
        part_lse: fp32 [S, q_len, Hq, P], base 2, written likewise; None if there is one part.
        max_blocks: N.
        part_blocks: blocks per part.
        num_parts: P.
        scale_log2: factor on the scores times log2(e).
        QUERIES: q_len.
        HEADS: Hq.
        GROUP: G.
        SLOTS: blocks per query and group; 0 without block_ids.
        PADDED_SLOTS: SLOTS rounded up to a power of two.
        DIM: d.
        BLOCK: B.
        TILE_QUERIES: queries per program; 1 with block_ids.
        ROWS: TILE_QUERIES * G, rounded up to a power of two of 16 or more.
        KEYS: keys per step, at most B.
        STAGES: steps in flight.
        UPCAST: multiply in fp32, for Triton's interpreter.
    """
    GROUPS: tl.constexpr = HEADS // GROUP
    STEPS: tl.constexpr = BLOCK // KEYS
    part = tl.program_id(0)
    sequence, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    first_query = tl.program_id(2) * TILE_QUERIES
    first_position = tl.load(lengths + sequence) - QUERIES
    row = tl.arange(0, ROWS)
    row_query = first_query + row // GROUP
    exists = (row < TILE_QUERIES * GROUP) & (row_query < QUERIES)
    position = first_position + row_query
    last = first_position + tl.minimum(first_query + TILE_QUERIES, QUERIES) - 1

    if block_ids is None:
        num_blocks = tl.cdiv(tl.maximum(last + 1, 0), BLOCK)
    else:
        block_ids += ((sequence * QUERIES + first_query) * GROUPS + group).to(tl.int64) * SLOTS
        num_blocks = _number_chosen(block_ids, SLOTS, PADDED_SLOTS)
    begin = part * part_blocks
    end = tl.minimum(begin + part_blocks, num_blocks)
    if part_lse is not None:  # noqa: SIM102 (this one is decided when compiling)
        if begin >= end:
            return

    dims = tl.arange(0, DIM)
    source = (sequence * QUERIES + row_query).to(tl.int64) * HEADS + group * GROUP + row % GROUP
    q = tl.load(query + source[:, None] * DIM + dims[None, :], mask=exists[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    key = tl.arange(0, KEYS)
    page_table += sequence.to(tl.int64) * max_blocks
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([DIM, ROWS], dtype=tl.float32)

    # Looked up a step ahead; without blocks, page_table[0] is read and not used.
    block = tl.maximum(_block_at(block_ids, begin), 0)
    page = tl.load(page_table + block)
    for step in tl.range(begin * STEPS, end * STEPS, num_stages=STAGES):
        start = step % STEPS * KEYS
        token = block * BLOCK + start + key
        place = (page.to(tl.int64) * GROUPS + group) * BLOCK + start + key
        block = _block_at(block_ids, tl.minimum((step + 1) // STEPS, end - 1))
        page = tl.load(page_table + block)

        is_seen = token <= last
        pointers = place[:, None] * DIM + dims[None, :]
        k = tl.load(key_cache + pointers, mask=is_seen[:, None], other=0.0).to(q.dtype)
        v = tl.load(value_cache + pointers, mask=is_seen[:, None], other=0.0)
        if value_scale is not None:
            v = v.to(tl.bfloat16)  # the weights are scaled, and fp16 may not hold them
        if UPCAST:
            v = v.to(tl.float32)
        scores = tl.dot(k, tl.trans(q))  # [KEYS, ROWS]
        if key_scale is not None:
            scores *= tl.load(key_scale + place, mask=is_seen, other=0.0)[:, None]
        scores = tl.where(token[:, None] <= position[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp2(scores - base[None, :])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, axis=0)
        if value_scale is not None:
            weights *= tl.load(value_scale + place, mask=is_seen, other=0.0)[:, None]
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * fade[None, :])  # [d, ROWS]
        top = new_top

    sees_any = total > 0
    divisor = tl.where(sees_any, total, 1.0)
    if part_lse is not None:
        source = source * num_parts + part
        tl.store(part_lse + source, top + tl.log2(divisor), mask=exists)
    result = tl.trans(acc / divisor[None, :])
    pointers = out + source[:, None] * DIM + dims[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=exists[:, None])


@triton.jit(
    do_not_specialize=["part_blocks", "num_parts"],
    do_not_specialize_on_alignment=["lengths", "block_ids"],
)
def decode_combine_kernel(
    part_out,
    part_lse,
    lengths,
    block_ids,
    out,
    part_blocks,
    num_parts,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per row: out [S, q_len, Hq, d], the parts weighted by 2^lse; 0 for a row without blocks.

    The arguments are those of ``decode_attend_kernel``; CHUNK parts are read at a time. Parts without blocks
    are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    row_query = row // HEADS
    if block_ids is None:
        sequence, query = row_query // QUERIES, (row_query % QUERIES).to(tl.int32)
        position = tl.load(lengths + sequence) - QUERIES + query
        num_blocks = tl.cdiv(tl.maximum(position + 1, 0), BLOCK)
    else:
        # row // GROUP is the number of the query and group.
        num_blocks = _number_chosen(block_ids + row // GROUP * SLOTS, SLOTS, PADDED_SLOTS)
    used_parts = tl.cdiv(num_blocks, part_blocks)
    dims = tl.arange(0, DIM)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM], dtype=tl.float32)
    for first in range(0, used_parts, CHUNK):
        part = first + tl.arange(0, CHUNK)
        is_used = part < used_parts
        lse = tl.load(part_lse + row * num_parts + part, mask=is_used, other=float("-inf"))
        pointers = part_out + (row * num_parts + part)[:, None] * DIM + dims[None, :]
        values = tl.load(pointers, mask=is_used[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp2(lse - base)
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, axis=0)
        acc = acc * fade + tl.sum(weights[:, None] * values, axis=0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty))
