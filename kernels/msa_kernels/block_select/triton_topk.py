"""The best blocks of each row, streamed from the block maxima, and, if wanted, their logsumexp.

A row is one query of one group, as in triton_scores.py. Scores are ranked without any exponential. One thread
serves one row, so that nothing is reduced over threads but the length of the longest queue.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(2**63))
HIGHEST_KEY = tl.constexpr(2**63 - 1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ranking_key(score, block):
    """int64 that orders by score and then by falling block id; all keys of a row differ.

    The bits of a float order like integers once the lower 31 bits of negative ones are flipped. Flipping all
    31 bits of a block id turns its order around.
    """
    score = tl.where(score == 0.0, 0.0, score)  # -0 and +0 tie
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (block ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _score_of_key(key):
    """The score that a ranking key was made of; the bit flips are their own inverse."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _put_in(chosen, worst, queue, count, ROWS: tl.constexpr):
    """Puts the waiting candidates of every row into ``chosen`` where they beat the worst there."""
    tl.debug_barrier()  # what other threads wrote into the queue
    for place in range(0, tl.max(count, axis=0)):
        waits = place < count
        candidate = tl.load(queue + place * ROWS, mask=waits, other=0)
        score = (candidate >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        key = ranking_key(score, candidate.to(tl.int32))
        enters = waits & (key > worst)
        chosen = tl.where((chosen == worst[None, :]) & enters[None, :], key[None, :], chosen)
        worst = tl.min(chosen, axis=0)
    tl.debug_barrier()  # before others overwrite it
    return chosen, worst


@triton.jit(
    do_not_specialize=["first_row", "end_row", "buffer_rows"],
    do_not_specialize_on_alignment=["query_position"],
)
def topk_kernel(
    block_max,
    block_lse,
    query_position,
    queue,
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
    FULL: tl.constexpr,
):
    """Chooses the blocks of ROWS rows.

    Few candidates beat the worst of the best so far (about COUNT * ln(blocks / COUNT) of a row's blocks if
    scores are in random order). Each row collects its own in a queue, and all rows of the program put theirs
    in together once the longest queue holds FULL: threads that run in step then hardly wait for each other.

    Args:
        block_max: fp32 [blocks, buffer_rows], read for blocks before each row's local block.
        block_lse: fp32 [blocks, buffer_rows], base 2, read for the chosen blocks; None for no logsumexp.
        query_position: int32 [Q].
        queue: int64 [programs, FULL + CHUNK, ROWS], scratch.
        block_ids: int32 [Q * GROUPS, COUNT], written.
        index_lse: fp32 [Q * GROUPS], natural log, written; None without block_lse.
        first_row: first row of this launch.
        end_row: the row behind the last one of this launch.
        buffer_rows: row capacity of the two buffers.
        GROUPS: index query heads per query.
        BLOCK: tokens per block.
        COUNT: blocks to choose, the local one included.
        SLOTS: COUNT rounded up to a power of two.
        ROWS: rows per program.
        CHUNK: blocks read at a time.
        FULL: length of a queue that is put in.
    """
    buffer_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row = first_row.to(tl.int64) + buffer_row
    in_range = row < end_row
    position = tl.load(query_position + row // GROUPS, mask=in_range, other=0)
    local_block = tl.where(in_range, position // BLOCK, 0)
    queue += tl.program_id(0).to(tl.int64) * ((FULL + CHUNK) * ROWS) + tl.arange(0, ROWS)

    # The local block takes one slot, so COUNT - 1 compete. Unfilled slots hold the lowest keys, each its own;
    # slots that take no part hold the highest and are never the worst.
    slot = tl.arange(0, SLOTS)[:, None]
    empty = tl.where(slot < COUNT - 1, slot.to(tl.int64) + LOWEST_KEY, HIGHEST_KEY)
    chosen = tl.broadcast_to(empty, [SLOTS, ROWS])
    worst = tl.min(chosen, axis=0)
    count = tl.zeros([ROWS], dtype=tl.int32)

    for first in range(0, tl.max(local_block, axis=0), CHUNK):
        block = first + tl.arange(0, CHUNK)[:, None]
        is_candidate = block < local_block[None, :]
        place = block.to(tl.int64) * buffer_rows + buffer_row[None, :]
        score = tl.load(block_max + place, mask=is_candidate, other=0.0)
        # A score equal to the worst is of a higher block and loses.
        has_empty = worst < LOWEST_KEY + SLOTS
        waits = is_candidate & ((score > _score_of_key(worst)[None, :]) | has_empty[None, :])
        number = tl.cumsum(waits.to(tl.int32), axis=0)
        entry = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | block.to(tl.int64)
        tl.store(queue[None, :] + (count[None, :] + number - 1) * ROWS, entry, mask=waits)
        count += tl.sum(waits.to(tl.int32), axis=0)
        if tl.max(count, axis=0) >= FULL:
            chosen, worst = _put_in(chosen, worst, queue, count, ROWS)
            count = tl.zeros([ROWS], dtype=tl.int32)
    chosen, worst = _put_in(chosen, worst, queue, count, ROWS)

    num_others = tl.minimum(local_block, COUNT - 1)[None, :]
    block_id = (chosen & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    block_id = tl.where(slot == num_others, local_block[None, :], block_id)
    block_id = tl.where(slot <= num_others, block_id, -1)
    is_stored = in_range[None, :] & (slot < COUNT)
    tl.store(block_ids + row[None, :] * COUNT + slot, block_id, mask=is_stored)

    if block_lse is not None:
        # The logsumexp over the tokens of the chosen blocks is the one over those blocks' logsumexps.
        place = block_id.to(tl.int64) * buffer_rows + buffer_row[None, :]
        is_chosen = is_stored & (block_id >= 0)
        lse = tl.load(block_lse + place, mask=is_chosen, other=float("-inf"))
        highest = tl.max(lse, axis=0)
        base = tl.where((highest == highest) & (tl.abs(highest) != float("inf")), highest, 0.0)
        total = tl.sum(tl.exp2(lse - base[None, :]), axis=0)
        tl.store(index_lse + row, (base + tl.log2(total)) * LN2, mask=in_range)
