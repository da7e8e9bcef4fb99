"""The best blocks of each row, streamed from the block maxima, and the logsumexp over what was chosen.

A row is one query of one group, as in triton_scores.py. Scores are ranked without any exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(2**63))
HIGHEST_KEY = tl.constexpr(2**63 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _ranking_key(score, block):
    """int64 that orders by score and then by falling block id; all keys of a row differ.

    The bits of a float order like integers once the lower 31 bits of negative ones are flipped. Flipping all
    31 bits of a block id turns its order around.
    """
    score = tl.where(score == 0.0, 0.0, score)  # -0 and +0 tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (block ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit(
    do_not_specialize=["first_row", "end_row", "buffer_rows"],
    do_not_specialize_on_alignment=["query_position"],
)
def topk_kernel(
    block_max,
    block_lse,
    query_position,
    block_ids,
    index_lse,
    first_row,
    end_row,
    buffer_rows,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chooses the blocks of ROWS rows.

    Few candidates beat the worst of the best so far (about COUNT * ln(blocks / COUNT) of a row's blocks if
    scores are in random order), so a chunk of blocks is compared with that threshold and only what beats it
    is put in, one candidate per row and step.

    Args:
        block_max: fp32 [blocks, buffer_rows], read for blocks before each row's local block.
        block_lse: fp32 [blocks, buffer_rows], base 2, read for the chosen blocks.
        query_position: int32 [Q].
        block_ids: int32 [Q * GROUPS, COUNT], written.
        index_lse: fp32 [Q * GROUPS], natural log, written.
        first_row: first row of this launch.
        end_row: the row behind the last one of this launch.
        buffer_rows: row capacity of the two buffers.
        GROUPS: index query heads per query.
        BLOCK: tokens per block.
        COUNT: blocks to choose, the local one included.
        SLOTS: COUNT rounded up to a power of two.
        ROWS: rows per program.
        CHUNK: blocks read at a time.
    """
    buffer_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = first_row.to(tl.int64) + buffer_row
    in_range = row < end_row
    position = tl.load(query_position + row // GROUPS, mask=in_range, other=0)
    local_block = position // BLOCK

    # The local block takes one slot, so COUNT - 1 compete. Unfilled slots hold the lowest keys, each its own,
    # and are filled from slot 0 on; slots that take no part hold the highest and are never the worst.
    slot = tl.arange(0, SLOTS)[:, None]
    empty = tl.where(slot < COUNT - 1, slot.to(tl.int64) + LOWEST_KEY, HIGHEST_KEY)
    chosen = tl.broadcast_to(empty, [SLOTS, ROWS])
    worst = tl.min(chosen, axis=0)

    for first in range(0, tl.max(local_block, axis=0), CHUNK):
        block = first + tl.arange(0, CHUNK)[:, None]
        is_candidate = (block < local_block[None, :]) & in_range[None, :]
        place = block.to(tl.int64) * buffer_rows + buffer_row[None, :]
        score = tl.load(block_max + place, mask=is_candidate, other=0.0)
        key = tl.where(is_candidate, _ranking_key(score, block), LOWEST_KEY)
        best = tl.max(key, axis=0)
        while tl.max((best > worst).to(tl.int32), axis=0) > 0:
            enters = best > worst
            chosen = tl.where((chosen == worst[None, :]) & enters[None, :], best[None, :], chosen)
            key = tl.where(key == best[None, :], LOWEST_KEY, key)
            worst = tl.min(chosen, axis=0)
            best = tl.max(key, axis=0)

    num_others = tl.minimum(local_block, COUNT - 1)[None, :]
    block_id = (chosen & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    block_id = tl.where(slot == num_others, local_block[None, :], block_id)
    block_id = tl.where(slot <= num_others, block_id, -1)
    is_stored = in_range[None, :] & (slot < COUNT)
    tl.store(block_ids + row[None, :] * COUNT + slot, block_id, mask=is_stored)

    # The logsumexp over the tokens of the chosen blocks is the one over those blocks' logsumexps.
    place = block_id.to(tl.int64) * buffer_rows + buffer_row[None, :]
    is_chosen = is_stored & (block_id >= 0)
    lse = tl.load(block_lse + place, mask=is_chosen, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    base = tl.where((highest == highest) & (tl.abs(highest) != float("inf")), highest, 0.0)
    total = tl.sum(tl.exp2(lse - base[None, :]), axis=0)
    tl.store(index_lse + row, (base + tl.log2(total)) * LN2, mask=in_range)
