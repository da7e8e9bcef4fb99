"""The best blocks of each row, from the block maxima.

A row is one query of one group; there are few rows and many blocks, so a program works on one row, and what
takes turns is kept short: no sorting, and no loop over the blocks to choose.

Letters in shapes: S sequences, R rows of a sequence, N most blocks of a sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msa_kernels.block_select.triton_topk import LOWEST_KEY, ranking_key


@triton.jit(
    do_not_specialize=["max_blocks"],
    do_not_specialize_on_alignment=["lengths"],
)
def decode_topk_kernel(
    block_max,
    lengths,
    block_ids,
    max_blocks,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chooses the blocks of one row: a tournament.

    The blocks before the local one are dealt out to SLOTS hands, block b to hand b mod SLOTS. In every round
    each hand is dealt out to PARTS hands in the same way, the hands are ranked by their best blocks, and the
    SLOTS best ones go on. The SLOTS best blocks are in them: any block of another hand has SLOTS better ones,
    the best of those hands. In the last round a hand is one block. With 8 parts a round leaves an eighth of
    the blocks: 8,192 blocks and 16 slots take three rounds.

    Args:
        block_max: fp32 [S, R, N], read for blocks before each row's local block.
        lengths: int32 [S].
        block_ids: int32 [S, R, COUNT], written.
        max_blocks: N.
        QUERIES: new tokens per sequence.
        GROUPS: R / QUERIES.
        BLOCK: tokens per block.
        COUNT: blocks to choose, the local one included.
        SLOTS: COUNT rounded up to a power of two.
        PARTS: hands that a hand is dealt out to, a power of two.
        CHUNK: blocks of a hand that are read at a time.
    """
    HANDS: tl.constexpr = SLOTS * PARTS
    row = tl.program_id(0).to(tl.int64)
    query = (row // GROUPS) % QUERIES
    position = tl.load(lengths + row // (GROUPS * QUERIES)) - QUERIES + query.to(tl.int32)
    # Floor division of a negative number rounds up: a query before position 0 has no local block.
    local_block = tl.where(position < 0, -1, position // BLOCK)
    block_max += row * max_blocks

    slot = tl.arange(0, SLOTS)
    hand = tl.arange(0, HANDS)
    step = tl.arange(0, CHUNK)
    first = slot  # first block of each hand; the others follow at distances of ``stride``
    stride = SLOTS
    size = tl.cdiv(local_block, SLOTS)
    is_last = False
    while not is_last:
        size = tl.cdiv(size, PARTS)
        dealt = first[None, :] + tl.arange(0, PARTS)[:, None] * stride
        dealt = tl.reshape(dealt, [HANDS])
        stride *= PARTS
        # Empty hands hold the lowest keys, each its own, so that no two hands share a rank.
        best = LOWEST_KEY + hand.to(tl.int64)
        for begin in range(0, size, CHUNK):
            # [HANDS, CHUNK]: neighbouring threads take neighbouring hands, and a hand stays within a thread.
            block = dealt[:, None] + (begin + step)[None, :] * stride
            is_candidate = block < local_block
            score = tl.load(block_max + block, mask=is_candidate, other=0.0)
            key = tl.where(is_candidate, ranking_key(score, block), LOWEST_KEY)
            best = tl.maximum(best, tl.max(key, axis=1))
        rank = tl.sum((best[None, :] > best[:, None]).to(tl.int32), axis=1)
        goes_on = rank[:, None] == slot[None, :]
        first = tl.sum(tl.where(goes_on, dealt[:, None], 0), axis=0)
        is_last = size <= 1

    num_others = tl.minimum(local_block, COUNT - 1)
    block_id = tl.where(slot < num_others, first, -1)
    block_id = tl.where(slot == num_others, local_block, block_id)
    tl.store(block_ids + row * COUNT + slot, block_id, mask=slot < COUNT)
