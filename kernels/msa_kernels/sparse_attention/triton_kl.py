"""KL of the index branch from the attention: its value, and its gradient for index_q and index_k.

The teacher P (mean over the heads of a group) is handed from kernel to kernel as fp32 [E, B], one row per
place in ``Schedule.entries``: G times smaller than the scores it comes from. The kernels of the index branch
then work on full tiles of entries instead of on the few query positions of a tile of heads.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
d_i index head dim, B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_sums import new_partial, sum_items, sum_slots
from msa_kernels.sparse_attention.triton_tiles import (
    LOG2E,
    entries_of_rows,
    find_item,
    hand_in_key_gradient,
    load_gathered_rows,
    load_key_tile,
    mean_over_heads,
)

# Rows of a tile (query positions times heads for the teacher, entries for the other two) and how the compiler
# runs it.
TEACHER_TILE = {"ROWS": 128, "num_warps": 4, "num_stages": 3}
DIVERGENCE_TILE = {"ROWS": 64, "num_warps": 4, "num_stages": 2}
GRADIENT_TILE = {"ROWS": 128, "num_warps": 8, "num_stages": 2}


@triton.jit
def _teach(
    q, lse, entries, own_key, teacher, entropy, key_tile, first_key, group, begin, end, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Teacher probabilities of the entries begin .. end of one bucket."""
    keys = tl.arange(0, BLOCK)
    POSITIONS: tl.constexpr = ROWS // triton.next_power_of_2(GROUP)
    for start in tl.range(begin, end, POSITIONS):
        _, query, head, inside = entries_of_rows(entries, start, end, group, GROUP, ENTRIES_PER_QUERY, ROWS)
        row = query * HEADS + (group * GROUP + head)
        q_tile = load_gathered_rows(q, row, inside, DIM)
        lse_log2 = tl.load(lse + row, mask=inside, other=float("inf")) * 1.4426950408889634
        # Keys by rows: the heads of a position then lie within a few neighbouring threads.
        log_p = tl.dot(key_tile, tl.trans(q_tile)) * scale_log2 - lse_log2[None, :]  # [B, ROWS]
        if CAUSAL:
            last_key = tl.load(own_key + query, mask=inside, other=0) - first_key
            log_p = tl.where(keys[:, None] <= last_key[None, :], log_p, float("-inf"))
        p = tl.exp2(log_p)
        place = start + tl.arange(0, POSITIONS)
        pointers = teacher + place.to(tl.int64)[None, :] * BLOCK + keys[:, None]
        tl.store(pointers, mean_over_heads(p, GROUP), mask=place[None, :] < end)
        if PER_HEAD:
            p_log_p = mean_over_heads(tl.where(p > 0, p * log_p, 0.0), GROUP)
            tl.store(entropy + place, tl.sum(p_log_p, 0), mask=place < end)


@triton.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item"])
def _teacher_kernel(
    q, k, lse, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks,
    num_buckets, entries_per_item, entries, own_key, teacher, entropy, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """One program per item. Writes teacher fp32 [E, B]; PER_HEAD also mean_h sum P_h log2 P_h, fp32 [E]."""
    begin, _, own_begin, end, first_key, num_keys, group, _ = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    if begin >= end:
        return
    key_tile = load_key_tile(k, first_key, num_keys, group, HEADS // GROUP, DIM, BLOCK)
    _teach(
        q, lse, entries, own_key, teacher, entropy, key_tile, first_key, group, begin, own_begin, scale_log2,
        HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, PER_HEAD, False,
    )  # fmt: skip
    _teach(
        q, lse, entries, own_key, teacher, entropy, key_tile, first_key, group, own_begin, end, scale_log2,
        HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, PER_HEAD, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item"])
def _divergence_kernel(
    index_q, index_k, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks,
    num_buckets, entries_per_item, entries, own_key, teacher, entropy, divergence, index_lse, scale_log2,
    GROUPS: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """One program per item. With z the index scores of an entry within its block, in units of log2, writes

    divergence[entry] = sum_j P log2 P - sum_j P z   (PER_HEAD: its first term is the given entropy)
    index_lse[entry]  = log2 sum_j 2^z
    """
    begin, _, _, end, first_key, num_keys, group, _ = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    if begin >= end:
        return
    index_key_tile = load_key_tile(index_k, first_key, num_keys, 0, 1, DIM, BLOCK)
    keys = tl.arange(0, BLOCK)
    for start in tl.range(begin, end, ROWS):
        entry, query, _head, inside = entries_of_rows(entries, start, end, group, 1, ENTRIES_PER_QUERY, ROWS)
        place = start + tl.arange(0, ROWS)
        tile = load_gathered_rows(index_q, query * GROUPS + group, inside, DIM)
        z = tl.dot(tile, tl.trans(index_key_tile)) * scale_log2  # [ROWS, B]
        last_key = tl.load(own_key + query, mask=inside, other=0) - first_key
        visible = keys[None, :] <= last_key[:, None]
        z = tl.where(visible, z, float("-inf"))
        top = tl.max(z, 1)
        lse = top + tl.log2(tl.sum(tl.exp2(z - top[:, None]), 1))
        pointers = teacher + place.to(tl.int64)[:, None] * BLOCK + keys[None, :]
        p = tl.load(pointers, mask=inside[:, None], other=0.0)
        cross = tl.sum(tl.where(p > 0, p * z, 0.0), 1)
        if PER_HEAD:
            p_log_p = tl.load(entropy + place, mask=inside, other=0.0)
        else:
            p_log_p = tl.sum(tl.where(p > 0, p * tl.log2(p), 0.0), 1)
        tl.store(divergence + entry, p_log_p - cross, mask=inside)
        tl.store(index_lse + entry, lse, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_divergence_kernel(
    divergence, slot_lse, kind, kl, index_lse, num_rows,
    SLOTS: tl.constexpr, PADDED_SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """kl and index_lse fp32 [rows], natural log, from those of the slots; a row is a query and group."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, PADDED_SLOTS)
    inside = row < num_rows
    entry = row[:, None] * SLOTS + slot[None, :]
    used = tl.load(kind + entry, mask=inside[:, None] & (slot < SLOTS)[None, :], other=3) != 3
    lse = tl.load(slot_lse + entry, mask=used, other=float("-inf"))
    top = tl.max(lse, 1)
    sees_any = top > float("-inf")
    safe_top = tl.where(sees_any, top, 0.0)
    total = safe_top + tl.log2(tl.sum(tl.exp2(lse - safe_top[:, None]), 1))  # -inf without any block
    value = tl.sum(tl.load(divergence + entry, mask=used, other=0.0), 1) + total
    tl.store(kl + row, tl.where(sees_any, value * 0.6931471805599453, 0.0), mask=inside)
    tl.store(index_lse + row, total * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item", "is_first_chunk"])
def _index_gradient_kernel(
    index_q, index_k, index_lse, dkl, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks,
    num_buckets, entries_per_item, entries, own_key, teacher, partial_dq, dk, partial_dk,
    is_first_chunk, scale_log2,
    GROUPS: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program per item. d kl / dz = S - P, with the student S = exp(z - index_lse).

    partial_dq fp32 [E, d_i] = dkl (S - P) index_k; dk fp32 [K, Hkv, d_i] gets (dkl (S - P))^T index_q added;
    both lack the factor of the scale.
    """
    begin, _, _, end, first_key, num_keys, group, row = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    if (begin >= end) & ((row >= 0) | (is_first_chunk == 0)):
        return
    index_key_tile = load_key_tile(index_k, first_key, num_keys, 0, 1, DIM, BLOCK)
    keys = tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    sum_dk = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for start in tl.range(begin, end, ROWS):
        entry, query, _head, inside = entries_of_rows(entries, start, end, group, 1, ENTRIES_PER_QUERY, ROWS)
        place = start + tl.arange(0, ROWS)
        query_group = query * GROUPS + group
        tile = load_gathered_rows(index_q, query_group, inside, DIM)
        z = tl.dot(tile, tl.trans(index_key_tile)) * scale_log2
        last_key = tl.load(own_key + query, mask=inside, other=0) - first_key
        visible = keys[None, :] <= last_key[:, None]
        lse = tl.load(index_lse + query_group, mask=inside, other=0.0) * 1.4426950408889634
        student = tl.where(visible, tl.exp2(z - lse[:, None]), 0.0)
        pointers = teacher + place.to(tl.int64)[:, None] * BLOCK + keys[None, :]
        p = tl.load(pointers, mask=inside[:, None], other=0.0)
        weight = tl.load(dkl + query_group, mask=inside, other=0.0)
        dz = ((student - p) * weight[:, None]).to(index_key_tile.dtype)
        dq = tl.dot(dz, index_key_tile)
        pointers = partial_dq + entry.to(tl.int64)[:, None] * DIM + dims[None, :]
        tl.store(pointers, dq, mask=inside[:, None])
        sum_dk = tl.dot(tl.trans(dz), tile, sum_dk)
    hand_in_key_gradient(
        dk, partial_dk, sum_dk, row, first_key, num_keys, group, is_first_chunk, GROUPS, DIM, BLOCK
    )


def new_teacher(schedule: Schedule) -> Tensor:
    """Buffer for the teacher of a chunk: fp32 [E, B], one row per place in ``schedule.entries``."""
    entries = schedule.entries
    return torch.empty(entries.numel(), schedule.block_size, dtype=torch.float32, device=entries.device)


def write_teacher(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    schedule: Schedule,
    teacher: Tensor,
    *,
    softmax_scale: float,
    entropy: Tensor | None = None,
) -> None:
    """Computes the scores again, now that lse is known, and writes the mean probabilities of the heads.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        lse: fp32 [Q, Hq], natural log.
        schedule: of these queries.
        teacher: see ``new_teacher``.
        softmax_scale: factor on the scores.
        entropy: fp32 [E] by place, for the mean over the heads of sum_j P_h log2 P_h; None if not wanted.
    """
    _, groups, slots = schedule.kind.shape
    heads, dim = q.shape[1:]
    _teacher_kernel[(schedule.max_items,)](
        q, k, lse, *schedule.arguments, teacher,
        teacher if entropy is None else entropy, softmax_scale * LOG2E,
        HEADS=heads, GROUP=heads // groups, ENTRIES_PER_QUERY=groups * slots, DIM=dim,
        BLOCK=schedule.block_size, PER_HEAD=entropy is not None, **TEACHER_TILE,
    )  # fmt: skip


def write_divergence(
    index_q: Tensor,
    index_k: Tensor,
    schedule: Schedule,
    teacher: Tensor,
    entropy: Tensor | None,
    kl: Tensor,
    index_lse: Tensor,
    *,
    index_softmax_scale: float,
) -> None:
    """KL of the student from the teacher, in nats, and the student's logsumexp over the selected tokens.

    Args:
        index_q: [Q, Hkv, d_i].
        index_k: [K, d_i].
        schedule: of these queries.
        teacher: from ``write_teacher``.
        entropy: from ``write_teacher`` for the per-head form of the KL, None for that of the mean.
        kl: fp32 [Q, Hkv], written; 0 for rows without any block.
        index_lse: fp32 [Q, Hkv], natural log, written; -inf for rows without any block.
        index_softmax_scale: factor on the index scores.
    """
    queries, groups, slots = schedule.kind.shape
    per_slot, slot_lse = (
        torch.empty(schedule.kind.shape, dtype=torch.float32, device=index_q.device) for _ in range(2)
    )
    _divergence_kernel[(schedule.max_items,)](
        index_q, index_k, *schedule.arguments, teacher, teacher if entropy is None else entropy, per_slot,
        slot_lse, index_softmax_scale * LOG2E, GROUPS=groups, ENTRIES_PER_QUERY=groups * slots,
        DIM=index_q.shape[2], BLOCK=schedule.block_size, PER_HEAD=entropy is not None, **DIVERGENCE_TILE,
    )  # fmt: skip
    rows = 32
    _sum_divergence_kernel[(triton.cdiv(queries * groups, rows),)](
        per_slot, slot_lse, schedule.kind, kl, index_lse, queries * groups,
        SLOTS=slots, PADDED_SLOTS=triton.next_power_of_2(slots), ROWS=rows, num_warps=4,
    )  # fmt: skip


def add_index_gradients(
    index_q: Tensor,
    index_k: Tensor,
    index_lse: Tensor,
    dkl: Tensor,
    schedule: Schedule,
    teacher: Tensor,
    dq: Tensor,
    dk: Tensor,
    factor: Tensor,
    *,
    is_first_chunk: bool,
    index_softmax_scale: float,
) -> None:
    """Gradient of kl for the index branch.

    Args:
        index_q: [Q, Hkv, d_i].
        index_k: [K, d_i].
        index_lse: fp32 [Q, Hkv], natural log.
        dkl: fp32 [Q, Hkv], upstream gradient.
        schedule: of these queries.
        teacher: from ``write_teacher`` or the backward pass of the attention.
        dq: [Q, Hkv, d_i], written.
        dk: fp32 [K, Hkv, d_i], what each group gives to the index key, without the scale and ``factor``;
            written in the first chunk, added to in the others.
        factor: fp32 scalar by which dkl was divided.
        is_first_chunk: whether this is the first chunk.
        index_softmax_scale: factor on the index scores.
    """
    _, groups, slots = schedule.kind.shape
    dim = index_q.shape[2]
    partial_dq = torch.empty(schedule.kind.numel(), dim, dtype=torch.float32, device=index_q.device)
    partial_dk = new_partial(schedule, dim)
    _index_gradient_kernel[(schedule.max_items,)](
        index_q, index_k, index_lse, dkl, *schedule.arguments, teacher,
        partial_dq, dk, partial_dk, int(is_first_chunk), index_softmax_scale * LOG2E,
        GROUPS=groups, ENTRIES_PER_QUERY=groups * slots, DIM=dim, BLOCK=schedule.block_size, **GRADIENT_TILE,
    )  # fmt: skip
    sum_slots(partial_dq, schedule, dq, scale=index_softmax_scale, factor=factor)
    sum_items(partial_dk, schedule, dk, is_first_chunk=is_first_chunk)
