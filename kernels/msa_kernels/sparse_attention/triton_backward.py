"""Backward kernels of the attention.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.hopper_choice import takes_hopper_backward
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

# Rows of a score tile (query positions times heads of the group) and how the compiler runs it.
TILE = {"ROWS": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(out, dout, delta, num_rows, DIM: tl.constexpr, ROWS: tl.constexpr):
    """delta fp32 [rows] = sum over d of out * dout, both [rows, d]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pointers = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    inside = row < num_rows
    out_tile = tl.load(out + pointers, mask=inside[:, None], other=0.0).to(tl.float32)
    dout_tile = tl.load(dout + pointers, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(out_tile * dout_tile, 1), mask=inside)


@triton.jit
def _differentiate(
    q, dout, lse, delta, entries, own_key, partial_dq, teacher, key_tile, value_tile, sum_dk, sum_dv,
    first_key, group, begin, end, scale, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WITH_TEACHER: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients from the entries begin .. end of one bucket; returns sum_dk and sum_dv with theirs added."""
    keys = tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    POSITIONS: tl.constexpr = ROWS // triton.next_power_of_2(GROUP)
    for start in tl.range(begin, end, POSITIONS):
        entry, query, head, inside = entries_of_rows(
            entries, start, end, group, GROUP, ENTRIES_PER_QUERY, ROWS
        )
        row = query * HEADS + (group * GROUP + head)
        q_tile = load_gathered_rows(q, row, inside, DIM)
        dout_tile = load_gathered_rows(dout, row, inside, DIM)
        lse_log2 = tl.load(lse + row, mask=inside, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + row, mask=inside, other=0.0)
        # Keys by rows: P and dS then go from registers into the products that sum over the queries.
        log_p = tl.dot(key_tile, tl.trans(q_tile)) * scale_log2 - lse_log2[None, :]  # [B, ROWS]
        if CAUSAL:
            last_key = tl.load(own_key + query, mask=inside, other=0) - first_key
            log_p = tl.where(keys[:, None] <= last_key[None, :], log_p, float("-inf"))
        p = tl.exp2(log_p)
        sum_dv = tl.dot(p.to(dout_tile.dtype), dout_tile, sum_dv)
        if WITH_TEACHER:
            place = start + tl.arange(0, POSITIONS)
            pointers = teacher + place.to(tl.int64)[None, :] * BLOCK + keys[:, None]
            tl.store(pointers, mean_over_heads(p, GROUP), mask=place[None, :] < end)
        dp = tl.dot(value_tile, tl.trans(dout_tile))
        ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
        sum_dk = tl.dot(ds, q_tile, sum_dk)
        # Scaled before it is rounded: without, fp16 overflows ten times as early as the gradient itself.
        dq = tl.dot(tl.trans(ds), key_tile) * scale
        partial_row = entry.to(tl.int64) * GROUP + head
        pointers = partial_dq + partial_row[:, None] * DIM + dims[None, :]
        tl.store(pointers, dq.to(partial_dq.dtype.element_ty), mask=inside[:, None])
    return sum_dk, sum_dv


@triton.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item", "is_first_chunk"])
def _backward_kernel(
    q, k, v, dout, lse, delta, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks,
    num_buckets, entries_per_item, entries, own_key, partial_dq, dk, partial_dk, dv, partial_dv,
    teacher, is_first_chunk, scale, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WITH_TEACHER: tl.constexpr,
):  # fmt: skip
    """One program per item.

    With P = exp(s - lse) and dS = P (dO V^T - delta): partial_dq [E, G, d] = scale dS K; dk and dv, both
    [K, Hkv, d], get scale dS^T Q and P^T dO (see ``hand_in_key_gradient``); WITH_TEACHER also writes
    the mean of P over the heads, fp32 [E, B].
    """
    begin, _, own_begin, end, first_key, num_keys, group, row = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    # In the first chunk the first item of a bucket writes zeros if there is nothing else.
    if (begin >= end) & ((row >= 0) | (is_first_chunk == 0)):
        return
    GROUPS: tl.constexpr = HEADS // GROUP
    key_tile = load_key_tile(k, first_key, num_keys, group, GROUPS, DIM, BLOCK)
    value_tile = load_key_tile(v, first_key, num_keys, group, GROUPS, DIM, BLOCK)
    sum_dk = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    sum_dv = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    sum_dk, sum_dv = _differentiate(
        q, dout, lse, delta, entries, own_key, partial_dq, teacher, key_tile, value_tile, sum_dk,
        sum_dv, first_key, group, begin, own_begin, scale, scale_log2,
        HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, WITH_TEACHER, False,
    )  # fmt: skip
    sum_dk, sum_dv = _differentiate(
        q, dout, lse, delta, entries, own_key, partial_dq, teacher, key_tile, value_tile, sum_dk,
        sum_dv, first_key, group, own_begin, end, scale, scale_log2,
        HEADS, GROUP, ENTRIES_PER_QUERY, DIM, BLOCK, ROWS, WITH_TEACHER, True,
    )  # fmt: skip
    hand_in_key_gradient(
        dk, partial_dk, sum_dk * scale, row, first_key, num_keys, group, is_first_chunk,
        GROUPS, DIM, BLOCK,
    )  # fmt: skip
    hand_in_key_gradient(
        dv, partial_dv, sum_dv, row, first_key, num_keys, group, is_first_chunk,
        GROUPS, DIM, BLOCK,
    )  # fmt: skip


def row_products(out: Tensor, dout: Tensor) -> Tensor:
    """delta, fp32 [Q, Hq]: sum over d of out * dout, both [Q, Hq, d]."""
    queries, heads, dim = out.shape
    delta = torch.empty(queries, heads, dtype=torch.float32, device=out.device)
    rows = 64
    grid = (triton.cdiv(queries * heads, rows),)
    _delta_kernel[grid](out, dout, delta, queries * heads, DIM=dim, ROWS=rows, num_warps=4)
    return delta


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    schedule: Schedule,
    partial_dq: Tensor,
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    is_first_chunk: bool,
    softmax_scale: float,
    teacher: Tensor | None,
) -> None:
    """What each entry of one chunk of queries adds to the gradients.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        lse: fp32 [Q, Hq], natural log.
        delta: fp32 [Q, Hq], see ``row_products``.
        dout: [Q, Hq, d], upstream gradient.
        schedule: of these queries.
        partial_dq: [E, G, d], written for used entries.
        sums: dk, and what ``sum_items`` adds to it; the same for dv. See ``add_attention_gradients``.
        is_first_chunk: whether this is the first chunk.
        softmax_scale: factor on the scores.
        teacher: as of ``add_attention_gradients``.
    """
    dk, partial_dk, dv, partial_dv = sums
    _, groups, slots = schedule.kind.shape
    heads, dim = q.shape[1:]
    _backward_kernel[(schedule.max_items,)](
        q, k, v, dout, lse, delta, *schedule.arguments, partial_dq,
        dk, partial_dk, dv, partial_dv, lse if teacher is None else teacher,
        int(is_first_chunk), softmax_scale, softmax_scale * LOG2E,
        HEADS=heads, GROUP=heads // groups, ENTRIES_PER_QUERY=groups * slots, DIM=dim,
        BLOCK=schedule.block_size, WITH_TEACHER=teacher is not None, **TILE,
    )  # fmt: skip


def add_attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    schedule: Schedule,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    is_first_chunk: bool,
    softmax_scale: float,
    teacher: Tensor | None,
) -> None:
    """Gradients of one chunk of queries.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        out: [Q, Hq, d].
        lse: fp32 [Q, Hq], natural log.
        dout: [Q, Hq, d], upstream gradient.
        schedule: of these queries.
        dq: [Q, Hq, d], written.
        dk: [K, Hkv, d], written in the first chunk, added to in the others (then fp32).
        dv: as dk.
        is_first_chunk: whether this is the first chunk.
        softmax_scale: factor on the scores.
        teacher: fp32 [E, B], written with the mean probabilities of the heads, by place; None if not wanted.
    """
    dim = q.shape[2]
    group = q.shape[1] // k.shape[1]
    partial_dq = torch.empty(schedule.kind.numel(), group, dim, dtype=q.dtype, device=q.device)
    partial_dk, partial_dv = (new_partial(schedule, dim) for _ in range(2))
    kernel = differentiate
    if takes_hopper_backward(q, k, v, dout, schedule.block_size):
        # Not at the top: other releases of Triton may not even import it.
        from msa_kernels.sparse_attention import hopper_backward

        kernel = hopper_backward.differentiate
    kernel(
        q, k, v, lse, row_products(out, dout), dout, schedule, partial_dq, (dk, partial_dk, dv, partial_dv),
        is_first_chunk=is_first_chunk, softmax_scale=softmax_scale, teacher=teacher,
    )  # fmt: skip
    sum_slots(partial_dq, schedule, dq, scale=1.0)
    sum_items(partial_dk, schedule, dk, is_first_chunk=is_first_chunk)
    sum_items(partial_dv, schedule, dv, is_first_chunk=is_first_chunk)
