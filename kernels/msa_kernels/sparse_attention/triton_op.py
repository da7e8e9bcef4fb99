"""Sparse attention on Triton: what it can run, the query chunks, and the two passes as one autograd function.

Letters in shapes: Q queries, K keys, Hq query heads, Hkv groups, d head dim, d_i index head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from msa_kernels.common.backend import Implementation
from msa_kernels.common.hopper import device_refusal
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import AttentionOutput
from msa_kernels.sparse_attention import triton_backward, triton_forward, triton_kl
from msa_kernels.sparse_attention.triton_schedule import KeyBlockTable, Schedule, max_blocks
from msa_kernels.sparse_attention.triton_sums import sum_groups

# Budget of the largest buffer, the per-slot outputs or gradients of a chunk of queries. Calls without
# gradients have no other large ones and may take more: fewer, longer chunks.
MAX_PARTIAL_BYTES = 3 * 2**30
WITHOUT_GRADIENTS = 4 / 3
# Score rows (query positions times heads of a group, rounded up to a power of two) that one program works
# through. Larger spares loads of the block and sums of its gradient, smaller spreads hot blocks better and
# evens out the end of a kernel.
ROWS_PER_ITEM = 8192
# Chunks of queries start at multiples of this, so that pointers keep the alignment they were compiled for.
CHUNK_MULTIPLE = 64

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
MAX_GROUP_SIZE = 16
MAX_SLOTS = 64


class _Settings(NamedTuple):
    """Everything about a call that is not a tensor and stays the same for all chunks."""

    block_size: int
    softmax_scale: float
    index_softmax_scale: float
    kl_teacher: str
    max_partial_bytes: int


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    index_q: Tensor | None,
    index_k: Tensor | None,
    index_lse: Tensor | None,
    softmax_scale: float,
    index_softmax_scale: float,
    kl_teacher: str,
) -> str | None:
    """Why the kernels cannot run these inputs; None if they can."""
    group = q.shape[1] // k.shape[1]
    if reason := device_refusal(q):
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {q.dtype}; supported are torch.bfloat16 and torch.float16"
    if q.shape[2] not in HEAD_DIMS:
        return f"the head dim is {q.shape[2]}; supported are {HEAD_DIMS}"
    if v.shape[2] != q.shape[2]:
        return f"the head dim of v is {v.shape[2]} but that of q and k is {q.shape[2]}; they must be equal"
    if index_q is not None and index_q.shape[2] not in HEAD_DIMS:
        return f"the index head dim is {index_q.shape[2]}; supported are {HEAD_DIMS}"
    if block_size not in BLOCK_SIZES:
        return f"the block size is {block_size}; supported are {BLOCK_SIZES}"
    if group > MAX_GROUP_SIZE:
        return f"there are {group} query heads per group; supported are 1 to {MAX_GROUP_SIZE}"
    if block_ids.shape[2] > MAX_SLOTS:
        return f"there are {block_ids.shape[2]} blocks per query; at most {MAX_SLOTS} are supported"
    blocks, most = KeyBlockTable.size(layout, k.shape[0], block_size), max_blocks(group, block_ids.shape[2])
    if blocks > most:
        return (
            f"there may be {blocks:,} blocks ({k.shape[0]:,} keys in blocks of {block_size}, and "
            f"{layout.num_documents:,} documents); at most {most:,} are supported with {group} query heads "
            f"per group and {block_ids.shape[2]} blocks per query"
        )
    return None


def sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    index_q: Tensor | None,
    index_k: Tensor | None,
    index_lse: Tensor | None,
    softmax_scale: float,
    index_softmax_scale: float,
    kl_teacher: str,
) -> AttentionOutput:
    """See ``msa_kernels.sparse_attention``; inputs are checked, index_k is [K, d_i], the scales are given.

    ``index_lse`` is not read: the pass that computes the KL normalises the index branch at almost no cost.
    """
    inputs = (q, k, v, index_q, index_k)
    needs_gradients = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in inputs
    )
    budget = MAX_PARTIAL_BYTES if needs_gradients else int(MAX_PARTIAL_BYTES * WITHOUT_GRADIENTS)
    settings = _Settings(block_size, softmax_scale, index_softmax_scale, kl_teacher, budget)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse, kl = _SparseAttention.apply(q, k, v, index_q, index_k, block_ids, layout, settings)
    return AttentionOutput(out, lse, kl)


IMPLEMENTATION = Implementation(run=sparse_attention_triton, refusal=refusal)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_q: Tensor | None,
        index_k: Tensor | None,
        block_ids: Tensor,
        layout: DocumentLayout,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        kl = index_lse = None
        if index_q is not None and index_k is not None:
            index_q, index_k = index_q.contiguous(), index_k.contiguous()
            # Two buffers, not halves of one: the second half's alignment would depend on the number of
            # queries, and kernels are compiled for the alignment of their pointers.
            kl, index_lse = (lse.new_empty(q.shape[0], k.shape[1]) for _ in range(2))
        # A schedule is small (5 bytes an entry): kept for the backward pass, where it is the same.
        chunks, of_schedules = [], []
        for rows, schedule in _chunks(q, k, block_ids, layout, settings):
            if any(ctx.needs_input_grad):
                tensors, rebuild = schedule.flatten()
                chunks.append((rows, rebuild))
                of_schedules += tensors
            triton_forward.attend(
                q[rows], k, v, schedule, out[rows], lse[rows], softmax_scale=settings.softmax_scale
            )
            if index_q is not None and index_k is not None:
                assert kl is not None
                assert index_lse is not None
                teacher = triton_kl.new_teacher(schedule)
                entropy = teacher.new_empty(teacher.shape[0]) if settings.kl_teacher == "per_head" else None
                triton_kl.write_teacher(
                    q[rows],
                    k,
                    lse[rows],
                    schedule,
                    teacher,
                    softmax_scale=settings.softmax_scale,
                    entropy=entropy,
                )
                triton_kl.write_divergence(
                    index_q[rows],
                    index_k,
                    schedule,
                    teacher,
                    entropy,
                    kl[rows],
                    index_lse[rows],
                    index_softmax_scale=settings.index_softmax_scale,
                )
        ctx.save_for_backward(q, k, v, index_q, index_k, out, lse, index_lse, *of_schedules)
        ctx.chunks = chunks
        ctx.settings = settings
        constant = [lse]
        if not any(ctx.needs_input_grad[:3]):
            constant.append(out)
        if kl is not None and not any(ctx.needs_input_grad[3:5]):
            constant.append(kl)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return out, lse, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, _: None, dkl: Any) -> tuple[Tensor | None, ...]:
        q, k, v, index_q, index_k, out, lse, index_lse, *of_schedules = ctx.saved_tensors
        tensors = iter(of_schedules)
        settings = ctx.settings
        attention = dout is not None and any(ctx.needs_input_grad[:3])
        index = dkl is not None and any(ctx.needs_input_grad[3:5])
        dq: Any = None
        dk: Any = None
        dv: Any = None
        dindex_q: Any = None
        dindex_k: Any = None
        # The first chunk writes all of the sums over queries; a single one writes them in their final dtype.
        new_sum = torch.empty if ctx.chunks else torch.zeros
        sum_dtype = k.dtype if len(ctx.chunks) == 1 else torch.float32
        if attention:
            dout = dout.contiguous()
            dq = torch.empty_like(q)
            dk, dv = (new_sum(k.shape, dtype=sum_dtype, device=k.device) for _ in range(2))
        if index:
            dindex_q = torch.empty_like(index_q)
            # In fp32 for each group: summed and cast once at the end.
            shape = (k.shape[0], k.shape[1], index_k.shape[1])
            dindex_k = new_sum(shape, dtype=torch.float32, device=q.device)
            # S - P times dkl is rounded to 16 bit before its last product. Upstream gradients as small as
            # 1 / (tokens * groups) would fall out of fp16's range there, so they are brought to at most 1.
            top = torch.linalg.vector_norm(dkl, math.inf) if dkl.numel() else dkl.new_zeros(())
            top = top.clamp(min=1e-37)
            dkl = (dkl / top).contiguous()
        for rows, rebuild in ctx.chunks:
            schedule = rebuild(tensors)
            teacher = triton_kl.new_teacher(schedule) if index else None
            if attention:
                triton_backward.add_attention_gradients(
                    q[rows],
                    k,
                    v,
                    out[rows],
                    lse[rows],
                    dout[rows],
                    schedule,
                    dq[rows],
                    dk,
                    dv,
                    is_first_chunk=rows.start == 0,
                    softmax_scale=settings.softmax_scale,
                    teacher=teacher,
                )
            elif teacher is not None:
                triton_kl.write_teacher(
                    q[rows], k, lse[rows], schedule, teacher, softmax_scale=settings.softmax_scale
                )
            if teacher is not None:
                triton_kl.add_index_gradients(
                    index_q[rows],
                    index_k,
                    index_lse[rows],
                    dkl[rows],
                    schedule,
                    teacher,
                    dindex_q[rows],
                    dindex_k,
                    top,
                    is_first_chunk=rows.start == 0,
                    index_softmax_scale=settings.index_softmax_scale,
                )
        if attention:
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        if index:
            of_groups, dindex_k = dindex_k, torch.empty_like(index_k)
            sum_groups(of_groups, dindex_k, scale=settings.index_softmax_scale, factor=top)
        return dq, dk, dv, dindex_q, dindex_k, None, None, None


def _chunks(
    q: Tensor, k: Tensor, block_ids: Tensor, layout: DocumentLayout, settings: _Settings
) -> Iterator[tuple[slice, Schedule]]:
    """Slices of the queries, and their schedules, such that the per-slot buffers stay within their budget."""
    queries, heads, dim = q.shape
    blocks = KeyBlockTable.build(layout, k.shape[0], settings.block_size)
    bytes_per_query = block_ids.shape[2] * heads * dim * q.dtype.itemsize
    multiples = max(1, settings.max_partial_bytes // bytes_per_query // CHUNK_MULTIPLE)
    num_chunks = triton.cdiv(queries, multiples * CHUNK_MULTIPLE)
    chunk = triton.cdiv(queries, max(1, num_chunks) * CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    group = heads // k.shape[1]
    for start in range(0, queries, max(1, chunk)):
        rows = slice(start, min(start + chunk, queries))
        schedule = Schedule.build(
            block_ids[rows],
            layout.select_queries(rows),
            blocks,
            group=group,
            block_size=settings.block_size,
            entries_per_item=ROWS_PER_ITEM // triton.next_power_of_2(group),
        )
        yield rows, schedule
