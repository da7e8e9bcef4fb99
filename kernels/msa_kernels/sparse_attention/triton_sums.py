"""Sums in a fixed order that finish the gradients: over the slots of a query, over the items of a bucket,
over the groups of an index key.

Letters in shapes: Q queries of the chunk, K keys, Hkv groups, G heads per group, d head dim, B block size,
E entries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.triton_schedule import Schedule


@triton.jit
def _sum_slots_kernel(
    partial, kind, total, factor, scale,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """One program per query and group: total [G, d] = scale times factor times the sum of its used
    slots, partial [slots, G, d]."""
    query_group = tl.program_id(0).to(tl.int64)
    PADDED_GROUP: tl.constexpr = triton.next_power_of_2(GROUP)
    row = tl.arange(0, PADDED_GROUP)[:, None]
    exists = row < GROUP
    dims = tl.arange(0, DIM)[None, :]
    acc = tl.zeros([PADDED_GROUP, DIM], dtype=tl.float32)
    for slot in tl.range(0, SLOTS):
        entry = query_group * SLOTS + slot
        # Unused slots hold whatever was in memory: not read.
        use = exists & (tl.load(kind + entry) != 3)
        acc += tl.load(partial + (entry * GROUP + row) * DIM + dims, mask=use, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        scale *= tl.load(factor)
    pointers = total + (query_group * GROUP + row) * DIM + dims
    tl.store(pointers, (acc * scale).to(total.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_blocks", "max_extra_items", "is_first_chunk"])
def _sum_items_kernel(
    gradient, partial, last_extra, first_keys, keys_in_block, num_blocks, max_extra_items, is_first_chunk,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per bucket and ROWS keys: adds the bucket's rows of partial to gradient, in order."""
    bucket = tl.program_id(0)
    first_extra = tl.load(last_extra + bucket - 1, mask=bucket > 0, other=0)
    end_extra = tl.load(last_extra + bucket)
    if first_extra >= end_extra:
        return
    block = bucket % num_blocks
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    key = (tl.load(first_keys + block) + place).to(tl.int64) * GROUPS + bucket // num_blocks
    pointers = gradient + key[:, None] * DIM + dims[None, :]
    in_block = place[:, None] < tl.load(keys_in_block + block)
    acc = tl.load(pointers, mask=in_block & (is_first_chunk == 0), other=0.0).to(tl.float32)
    # The first item's row, then those of the extra ones.
    row = max_extra_items + first_extra
    acc += tl.load(partial + (row * BLOCK + place[:, None]).to(tl.int64) * DIM + dims[None, :])
    for extra in tl.range(first_extra, end_extra):
        acc += tl.load(partial + (extra * BLOCK + place[:, None]).to(tl.int64) * DIM + dims[None, :])
    tl.store(pointers, acc.to(gradient.dtype.element_ty), mask=in_block)


@triton.jit(do_not_specialize=["num_keys"])
def _sum_groups_kernel(
    partial, total, factor, scale, num_keys, GROUPS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    """One program per ROWS keys: total [K, d] = scale times factor times partial [K, groups, d] summed."""
    key = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)[None, :]
    inside = key[:, None] < num_keys
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        acc += tl.load(partial + (key[:, None] * GROUPS + group) * DIM + dims, mask=inside, other=0.0)
    acc *= scale * tl.load(factor)
    tl.store(total + key[:, None] * DIM + dims, acc.to(total.dtype.element_ty), mask=inside)


def sum_slots(
    partial: Tensor, schedule: Schedule, total: Tensor, *, scale: float, factor: Tensor | None = None
) -> None:
    """Writes total [Q, Hkv * G, d]: the sum over the slots of partial [E, G, d], times the factors."""
    queries, groups, slots = schedule.kind.shape
    group, dim = total.shape[1] // groups, total.shape[2]
    _sum_slots_kernel[(queries * groups,)](
        partial, schedule.kind, total, partial if factor is None else factor, scale,
        GROUP=group, SLOTS=slots, DIM=dim, HAS_FACTOR=factor is not None, num_warps=4,
    )  # fmt: skip


def new_partial(schedule: Schedule, dim: int) -> Tensor:
    """Buffer for the key gradients of items that share a bucket with others: fp32 [items, B, d]."""
    shape = (2 * schedule.max_extra_items, schedule.block_size, dim)
    return torch.empty(shape, dtype=torch.float32, device=schedule.entries.device)


def sum_items(partial: Tensor, schedule: Schedule, gradient: Tensor, *, is_first_chunk: bool) -> None:
    """Adds partial (see ``new_partial``) to gradient [K, Hkv, d], which the first chunk finds unwritten."""
    if schedule.max_extra_items == 0:
        return
    groups, dim = gradient.shape[1:]
    rows = 16
    blocks = schedule.blocks
    num_blocks = blocks.first_key.numel()
    _sum_items_kernel[(groups * num_blocks, schedule.block_size // rows)](
        gradient, partial, schedule.last_extra, blocks.first_key, blocks.num_keys, num_blocks,
        schedule.max_extra_items, int(is_first_chunk),
        GROUPS=groups, DIM=dim, BLOCK=schedule.block_size, ROWS=rows, num_warps=4,
    )  # fmt: skip


def sum_groups(partial: Tensor, total: Tensor, *, scale: float, factor: Tensor) -> None:
    """Writes total [K, d]: the sum over the groups of partial, fp32 [K, Hkv, d], times the factors."""
    keys, groups, dim = partial.shape
    rows = 32
    _sum_groups_kernel[(triton.cdiv(keys, rows),)](
        partial, total, factor, scale, keys, GROUPS=groups, DIM=dim, ROWS=rows, num_warps=4
    )
