"""Forward kernels: attention within each block that few queries of a tile chose, and the sum over all blocks.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.hopper_choice import takes_hopper_kernels
from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_shared import attend_shared
from msa_kernels.sparse_attention.triton_tiles import (
    LOG2E,
    entries_of_rows,
    find_item,
    load_gathered_rows,
    load_key_tile,
)

# Rows of a score tile (query positions times heads of the group) and how the compiler runs it. Two programs
# of four warps share a multiprocessor, so that one's softmax runs beside the other's products.
TILE = {"ROWS": 64, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item"])
def _attend_rest_kernel(
    q, k, v, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks,
    num_buckets, entries_per_item, entries, own_key, partial_out, partial_lse,
    scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per item. Writes partial_out [E, G, d], normalised, and partial_lse fp32 [E, G], log2."""
    begin, end, _, _, first_key, num_keys, group, _ = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    if begin >= end:
        return
    key_tile = load_key_tile(k, first_key, num_keys, group, HEADS // GROUP, DIM, BLOCK)
    value_tile = load_key_tile(v, first_key, num_keys, group, HEADS // GROUP, DIM, BLOCK)
    dims = tl.arange(0, DIM)
    for start in tl.range(begin, end, ROWS // triton.next_power_of_2(GROUP)):
        entry, query, head, inside = entries_of_rows(
            entries, start, end, group, GROUP, ENTRIES_PER_QUERY, ROWS
        )
        q_tile = load_gathered_rows(q, query * HEADS + (group * GROUP + head), inside, DIM)  # [ROWS, d]
        # No mask: the queries lie behind the block, which then has all its keys.
        scores = tl.dot(q_tile, tl.trans(key_tile))  # [ROWS, B]
        top = tl.max(scores, 1) * scale_log2
        weights = tl.exp2(scores * scale_log2 - top[:, None])
        total = tl.sum(weights, 1)
        out = tl.dot(weights.to(value_tile.dtype), value_tile) * (1.0 / total)[:, None]
        row = entry.to(tl.int64) * GROUP + head
        pointers = partial_out + row[:, None] * DIM + dims[None, :]
        tl.store(pointers, out.to(partial_out.dtype.element_ty), mask=inside[:, None])
        tl.store(partial_lse + row, top + tl.log2(total), mask=inside)


@triton.jit
def _combine_kernel(
    partial_out, partial_lse, kind, out, lse,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, PADDED_SLOTS: tl.constexpr, DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program per query and group: adds the parts of its slots of kind REST, weighted by 2^lse."""
    query_group = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, PADDED_SLOTS)
    is_rest = tl.load(kind + query_group * SLOTS + slot, mask=slot < SLOTS, other=3) == 0
    if tl.max(is_rest.to(tl.int32), 0) == 0:
        return
    head = tl.arange(0, triton.next_power_of_2(GROUP))
    exists = head < GROUP
    dims = tl.arange(0, DIM)
    pointers = partial_lse + (query_group * SLOTS + slot[:, None]) * GROUP + head[None, :]
    slot_lse = tl.load(pointers, mask=is_rest[:, None] & exists[None, :], other=float("-inf"))  # [slots, G]
    shared_lse = tl.load(lse + query_group * GROUP + head, mask=exists, other=0.0) * 1.4426950408889634
    top = tl.maximum(tl.max(slot_lse, 0), shared_lse)
    total = tl.sum(tl.exp2(slot_lse - top[None, :]), 0) + tl.exp2(shared_lse - top)
    total = top + tl.log2(total)

    out_pointers = out + (query_group * GROUP + head[:, None]) * DIM + dims[None, :]
    shared_out = tl.load(out_pointers, mask=exists[:, None], other=0.0).to(tl.float32)
    sum_out = tl.exp2(shared_lse - total)[:, None] * shared_out
    for first in tl.range(0, SLOTS, AT_ONCE):
        # Loads of several slots before the first use.
        parts = ()
        lses = ()
        for each in tl.static_range(AT_ONCE):
            slot_number = first + each
            row = (query_group * SLOTS + slot_number) * GROUP + head
            # Other slots hold whatever was in memory: not read.
            slot_kind = tl.load(kind + query_group * SLOTS + slot_number, mask=slot_number < SLOTS, other=3)
            use = exists & (slot_kind == 0)
            lses = lses + (tl.load(partial_lse + row, mask=use, other=float("-inf")),)  # type: ignore[assignment]  # noqa: RUF005
            part = partial_out + row[:, None] * DIM + dims[None, :]
            parts = parts + (tl.load(part, mask=use[:, None], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        for each in tl.static_range(AT_ONCE):
            sum_out += tl.exp2(lses[each] - total)[:, None] * parts[each].to(tl.float32)
    tl.store(out_pointers, sum_out.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + query_group * GROUP + head, total * 0.6931471805599453, mask=exists)


def attend_rest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    partial_out: Tensor,
    partial_lse: Tensor,
    *,
    softmax_scale: float,
) -> None:
    """Attention of the entries of kind REST of one chunk of queries, each within its block.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        schedule: of these queries.
        partial_out: [E, G, d], written for those entries, normalised.
        partial_lse: fp32 [E, G], log2, likewise.
        softmax_scale: factor on the scores.
    """
    _, groups, slots = schedule.kind.shape
    heads, dim = q.shape[1:]
    _attend_rest_kernel[(schedule.max_items,)](
        q, k, v, *schedule.arguments, partial_out, partial_lse,
        softmax_scale * LOG2E, HEADS=heads, GROUP=heads // groups, ENTRIES_PER_QUERY=groups * slots, DIM=dim,
        BLOCK=schedule.block_size, **TILE,
    )  # fmt: skip


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
    _, groups, slots = schedule.kind.shape
    heads, dim = q.shape[1:]
    group = heads // groups
    num_entries = schedule.kind.numel()
    partial_out = torch.empty(num_entries, group, dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(num_entries, group, dtype=torch.float32, device=q.device)
    shared_kernel, rest_kernel = attend_shared, attend_rest
    if takes_hopper_kernels(q, k, v):
        # Not at the top: other releases of Triton may not even import them.
        from msa_kernels.sparse_attention import hopper_rest, hopper_shared

        shared_kernel, rest_kernel = hopper_shared.attend_shared, hopper_rest.attend_rest
    shared_kernel(q, k, v, schedule, out, lse, softmax_scale=softmax_scale)
    rest_kernel(q, k, v, schedule, partial_out, partial_lse, softmax_scale=softmax_scale)
    _combine_kernel[(q.shape[0] * groups,)](
        partial_out, partial_lse, schedule.kind, out, lse,
        GROUP=group, SLOTS=slots, PADDED_SLOTS=triton.next_power_of_2(slots), DIM=dim,
        AT_ONCE=4, num_warps=4,
    )  # fmt: skip
