"""Forward kernels: attention within each chosen block, then the sum over the blocks of a query.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_tiles import (
    LOG2E,
    entries_of_rows,
    load_gathered_rows,
    load_key_tile,
)

# Rows of a score tile (query positions times heads of the group) and how the compiler runs it. Two programs
# of four warps share a multiprocessor, so that one's softmax runs beside the other's products.
TILE = {"ROWS": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _attend(
    q, entries, place_in_block, partial_out, partial_lse, key_tile, value_tile, group, begin, end, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax attention of the entries begin .. end within one block; begin .. end lie in one bucket."""
    dims = tl.arange(0, DIM)
    for start in tl.range(begin, end, ROWS // GROUP):
        entry, query, head, inside = entries_of_rows(
            entries, start, end, group, GROUP, ENTRIES_PER_QUERY, ROWS
        )
        q_tile = load_gathered_rows(q, query * HEADS + head, inside, DIM)  # [ROWS, d]
        scores = tl.dot(q_tile, tl.trans(key_tile)) * scale_log2  # [ROWS, B], in units of log2
        if CAUSAL:
            last_key = tl.load(place_in_block + query, mask=inside, other=0)
            scores = tl.where(tl.arange(0, BLOCK)[None, :] <= last_key[:, None], scores, float("-inf"))
        # An entry sees at least one key of its block, so the maximum is finite.
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        out = tl.dot(weights.to(value_tile.dtype), value_tile) / total[:, None]
        row = entry.to(tl.int64) * GROUP + tl.arange(0, ROWS) % GROUP
        pointers = partial_out + row[:, None] * DIM + dims[None, :]
        tl.store(pointers, out.to(partial_out.dtype.element_ty), mask=inside[:, None])
        tl.store(partial_lse + row, top + tl.log2(total), mask=inside)


@triton.jit
def _attend_kernel(
    q, k, v, items, entries, place_in_block, partial_out, partial_lse, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per item. Writes partial_out [E, G, d], normalised, and partial_lse fp32 [E, G], log2."""
    item = items + tl.program_id(0) * 8
    begin = tl.load(item)
    own_begin = tl.load(item + 1)
    end = tl.load(item + 2)
    if begin >= end:
        return
    first_key, num_keys, group = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    key_tile = load_key_tile(k, first_key, num_keys, group, HEADS // GROUP, DIM, BLOCK)
    value_tile = load_key_tile(v, first_key, num_keys, group, HEADS // GROUP, DIM, BLOCK)
    _attend(
        q, entries, place_in_block, partial_out, partial_lse, key_tile, value_tile, group, begin, own_begin,
        scale_log2, HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, False,
    )  # fmt: skip
    _attend(
        q, entries, place_in_block, partial_out, partial_lse, key_tile, value_tile, group, own_begin, end,
        scale_log2, HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, True,
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    partial_out, partial_lse, used, out, lse,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, PADDED_SLOTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program per query and group: out and lse from the partial ones of its slots, weighted by 2^lse."""
    query_group = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, GROUP)
    dims = tl.arange(0, DIM)

    slot = tl.arange(0, PADDED_SLOTS)
    in_range = slot < SLOTS
    is_used = tl.load(used + query_group * SLOTS + slot, mask=in_range, other=0) != 0
    pointers = partial_lse + (query_group * SLOTS + slot[:, None]) * GROUP + head[None, :]
    slot_lse = tl.load(pointers, mask=is_used[:, None], other=float("-inf"))  # [slots, G]
    top = tl.max(slot_lse, 0)
    sees_any = top > float("-inf")
    safe_top = tl.where(sees_any, top, 0.0)
    total = safe_top + tl.log2(tl.sum(tl.exp2(slot_lse - safe_top[None, :]), 0))  # -inf without any block
    safe_total = tl.where(sees_any, total, 0.0)

    sum_out = tl.zeros([GROUP, DIM], dtype=tl.float32)
    for slot_number in tl.range(0, SLOTS):
        row = (query_group * SLOTS + slot_number) * GROUP + head
        # Unused slots hold whatever was in memory: not read.
        use = tl.load(used + query_group * SLOTS + slot_number) != 0
        row_lse = tl.load(partial_lse + row, mask=use, other=float("-inf"))
        partial = tl.load(partial_out + row[:, None] * DIM + dims[None, :], mask=use, other=0.0)
        sum_out += tl.exp2(row_lse - safe_total)[:, None] * partial.to(tl.float32)
    out_pointers = out + (query_group * GROUP + head[:, None]) * DIM + dims[None, :]
    tl.store(out_pointers, sum_out.to(out.dtype.element_ty))
    tl.store(lse + query_group * GROUP + head, total * 0.6931471805599453)


def attend(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, out: Tensor, lse: Tensor, *, softmax_scale: float
) -> None:
    """Attention of one chunk of queries.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        schedule: of these queries.
        out: [Q, Hq, d], written.
        lse: fp32 [Q, Hq], natural log, written.
        softmax_scale: factor on the scores.
    """
    _, groups, slots = schedule.used.shape
    heads, dim = q.shape[1:]
    group = heads // groups
    num_entries = schedule.used.numel()
    block_size = schedule.block_size
    partial_out = torch.empty(num_entries, group, dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(num_entries, group, dtype=torch.float32, device=q.device)
    _attend_kernel[(schedule.max_items,)](
        q, k, v, schedule.items, schedule.entries, schedule.place_in_block, partial_out, partial_lse,
        softmax_scale * LOG2E, HEADS=heads, GROUP=group, ENTRIES_PER_QUERY=groups * slots, DIM=dim,
        BLOCK=block_size, **TILE,
    )  # fmt: skip
    _combine_kernel[(q.shape[0] * groups,)](
        partial_out, partial_lse, schedule.used, out, lse,
        GROUP=group, SLOTS=slots, PADDED_SLOTS=triton.next_power_of_2(slots), DIM=dim, num_warps=4,
    )  # fmt: skip
