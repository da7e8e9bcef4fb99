"""Sums in a fixed order that finish the gradients: over the slots of a query, over the items of a bucket.

Letters in shapes: Q queries of the chunk, K keys, Hkv groups, G heads per group, d head dim, B block size,
E entries (see triton_schedule.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.triton_schedule import Schedule


@triton.jit
def _sum_slots_kernel(partial, used, total, GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr):
    """One program per query and group: total [G, d] = sum of its used slots, partial [slots, G, d]."""
    query_group = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, GROUP)[:, None]
    dims = tl.arange(0, DIM)[None, :]
    acc = tl.zeros([GROUP, DIM], dtype=tl.float32)
    for slot in tl.range(0, SLOTS):
        entry = query_group * SLOTS + slot
        # Unused slots hold whatever was in memory: not read.
        use = tl.load(used + entry) != 0
        acc += tl.load(partial + (entry * GROUP + row) * DIM + dims, mask=use, other=0.0).to(tl.float32)
    pointers = total + (query_group * GROUP + row) * DIM + dims
    tl.store(pointers, acc.to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_extra_items_kernel(
    gradient, partial, last_extra_item, first_keys, keys_in_block, num_blocks,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per bucket and ROWS keys: adds the bucket's rows of partial to gradient, in order."""
    bucket = tl.program_id(0)
    begin = tl.load(last_extra_item + bucket - 1, mask=bucket > 0, other=0)
    end = tl.load(last_extra_item + bucket)
    if begin >= end:
        return
    block = bucket % num_blocks
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    row = (tl.load(first_keys + block) + place).to(tl.int64) * GROUPS + bucket // num_blocks
    pointers = gradient + row[:, None] * DIM + dims[None, :]
    in_block = place[:, None] < tl.load(keys_in_block + block)
    acc = tl.load(pointers, mask=in_block, other=0.0)
    for extra in tl.range(begin, end):
        source = partial + (extra * BLOCK + place[:, None]).to(tl.int64) * DIM + dims[None, :]
        acc += tl.load(source)
    tl.store(pointers, acc, mask=in_block)


def sum_slots(partial: Tensor, schedule: Schedule, total: Tensor) -> None:
    """Writes total [Q, Hkv * G, d]: the sum over the slots of partial [E, G, d]."""
    queries, groups, slots = schedule.used.shape
    group, dim = total.shape[1] // groups, total.shape[2]
    _sum_slots_kernel[(queries * groups,)](
        partial, schedule.used, total, GROUP=group, SLOTS=slots, DIM=dim, num_warps=4
    )


def sum_extra_items(partial: Tensor, schedule: Schedule, gradient: Tensor) -> None:
    """Adds partial, fp32 [max_extra_items, B, d], to gradient, fp32 [K, Hkv, d], item after item."""
    if schedule.max_extra_items == 0:
        return
    groups, dim = gradient.shape[1:]
    rows = 16
    blocks = schedule.blocks
    num_blocks = blocks.first_key.numel()
    _sum_extra_items_kernel[(groups * num_blocks, schedule.block_size // rows)](
        gradient, partial, schedule.last_extra_item, blocks.first_key, blocks.num_keys, num_blocks,
        GROUPS=groups, DIM=dim, BLOCK=schedule.block_size, ROWS=rows, num_warps=4,
    )  # fmt: skip
