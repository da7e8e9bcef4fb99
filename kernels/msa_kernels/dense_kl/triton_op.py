"""dense_kl on a GPU: what can run, the attention by the fastest kernel that can, and the KL beside it.

The KL needs nothing of the attention but its LSE, and gives it no gradient: two autograd functions that do
not know each other.

Letters in shapes: Q queries, K keys, Hq query heads, Hkv groups, d head dim, d_i index head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msa_kernels.common.backend import Implementation
from msa_kernels.common.hopper import device_refusal
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import AttentionOutput
from msa_kernels.dense_kl import triton_backward, triton_forward, triton_kl, triton_kl_gradient
from msa_kernels.dense_kl.library import choose_library
from msa_kernels.dense_kl.triton_queries import SortedQueries, aligned

HEAD_DIMS = (64, 128)
MAX_GROUP_SIZE = 16


class _Settings(NamedTuple):
    """Everything about a call's KL that is not a tensor."""

    softmax_scale: float
    index_softmax_scale: float
    per_head: bool
    max_document_length: int


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    index_q: Tensor | None,
    index_k: Tensor | None,
    softmax_scale: float,
    index_softmax_scale: float,
    kl_teacher: str,
) -> str | None:
    """Why the kernels cannot run these inputs; None if they can."""
    group = q.shape[1] // k.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {q.dtype}; supported are torch.bfloat16 and torch.float16"
    if q.shape[2] not in HEAD_DIMS:
        return f"the head dim is {q.shape[2]}; supported are {HEAD_DIMS}"
    if v.shape[2] != q.shape[2]:
        return f"the head dim of v is {v.shape[2]} but that of q and k is {q.shape[2]}; they must be equal"
    if index_q is not None and index_q.shape[2] not in HEAD_DIMS:
        return f"the index head dim is {index_q.shape[2]}; supported are {HEAD_DIMS}"
    if group > MAX_GROUP_SIZE:
        return f"there are {group} query heads per group; supported are 1 to {MAX_GROUP_SIZE}"
    return device_refusal(q)


def dense_kl_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    index_q: Tensor | None,
    index_k: Tensor | None,
    softmax_scale: float,
    index_softmax_scale: float,
    kl_teacher: str,
) -> AttentionOutput:
    """See ``msa_kernels.dense_kl``; inputs are checked, index_k is [K, d_i], the scales are given."""
    with torch.cuda.device_of(q):  # Triton launches on the current device
        k, v = aligned(k), aligned(v)
        queries = SortedQueries.build(layout)
        library = choose_library(q, k, layout)
        if library is not None:
            out, lse = library(aligned(q), k, v, layout, softmax_scale)
        else:
            out, lse = _DenseAttention.apply(q, k, v, queries, softmax_scale)
        kl = None
        if index_q is not None and index_k is not None:
            settings = _Settings(
                softmax_scale, index_softmax_scale, kl_teacher == "per_head", layout.max_document_length
            )
            kl = _KL.apply(index_q, index_k, q.detach(), k.detach(), lse, queries, settings)
    return AttentionOutput(out, lse, kl)


IMPLEMENTATION = Implementation(run=dense_kl_triton, refusal=refusal)


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: SortedQueries, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        if queries.num_queries == 0:
            out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        else:
            by_place = triton_forward.attend(queries.by_place(q), k, v, queries, softmax_scale=softmax_scale)
            out, lse = (queries.by_query(tensor) for tensor in by_place)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.queries = queries
        ctx.softmax_scale = softmax_scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            return None, None, None, None, None
        if ctx.queries.num_queries == 0:
            return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None
        queries = ctx.queries
        q, out, lse, dout = (queries.by_place(tensor) for tensor in (q, out, lse, dout))
        dq, dk, dv = triton_backward.attention_gradients(
            q, k, v, out, lse, dout, queries, softmax_scale=ctx.softmax_scale
        )
        return queries.by_query(dq), dk, dv, None, None


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index_q: Tensor,
        index_k: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        queries: SortedQueries,
        settings: _Settings,
    ) -> Tensor:
        index_k = aligned(index_k)
        if queries.num_queries == 0:
            kl, index_lse = (lse.new_empty(index_q.shape[:2]) for _ in range(2))
        else:
            q_by_place, lse_by_place, index_q_by_place = (
                queries.by_place(tensor) for tensor in (q, lse, index_q)
            )
            by_place = triton_kl.divergence(
                q_by_place,
                k,
                lse_by_place,
                index_q_by_place,
                index_k,
                queries,
                softmax_scale=settings.softmax_scale,
                index_softmax_scale=settings.index_softmax_scale,
                per_head=settings.per_head,
            )
            kl, index_lse = (queries.by_query(tensor) for tensor in by_place)
        ctx.save_for_backward(q, k, lse, index_q, index_k, index_lse)
        ctx.queries = queries
        ctx.settings = settings
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl: Any) -> tuple[Tensor | None, ...]:
        q, k, lse, index_q, index_k, index_lse = ctx.saved_tensors
        if ctx.queries.num_queries == 0:
            return torch.empty_like(index_q), torch.zeros_like(index_k), *[None] * 5
        queries, settings = ctx.queries, ctx.settings
        q, lse, index_q, index_lse, dkl = (
            queries.by_place(tensor) for tensor in (q, lse, index_q, index_lse, dkl)
        )
        dindex_q, dindex_k = triton_kl_gradient.index_gradients(
            q,
            k,
            lse,
            index_q,
            index_k,
            index_lse,
            dkl,
            queries,
            settings.max_document_length,
            softmax_scale=settings.softmax_scale,
            index_softmax_scale=settings.index_softmax_scale,
        )
        return queries.by_query(dindex_q), dindex_k, *[None] * 5
