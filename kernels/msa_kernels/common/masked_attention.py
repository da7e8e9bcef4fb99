"""Attention over a given set of keys per query, and the KL divergence of the index branch from it.

This is the arithmetic that sparse_attention and dense_kl share; they differ only in the set of keys.
Equations: MiniMax Sparse Attention, arXiv 2606.13392.

Letters in shapes: Q queries, K keys, Hkv groups (= key/value heads), G query heads per group, d head dim,
d_v value head dim, d_i index head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msa_kernels.common.chunks import in_query_chunks
from msa_kernels.common.numerics import accumulation_dtype
from msa_kernels.common.outputs import AttentionOutput


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[slice], Tensor],
    *,
    index_q: Tensor | None,
    index_k: Tensor | None,
    softmax_scale: float,
    index_softmax_scale: float,
    kl_teacher: str,
) -> AttentionOutput:
    """Softmax attention over the visible keys, and KL(attention || index branch) over the same keys.

    Works through the queries in chunks and computes in the accumulation dtype. A query that sees no key gets
    out 0, lse -inf and kl 0, with zero gradients.

    Args:
        q: [Q, Hkv * G, d].
        k: [K, Hkv, d].
        v: [K, Hkv, d_v].
        visible: maps a slice of the queries to the keys that take part, bool [Hkv or 1, Q of the slice, K].
        index_q: [Q, Hkv, d_i] or None for no KL.
        index_k: [K, d_i] or None.
        softmax_scale: factor on the main scores.
        index_softmax_scale: factor on the index scores.
        kl_teacher: "group_mean" or "per_head".
    """
    dtype = accumulation_dtype(q.dtype)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (q, k, v, index_q, index_k)
    )
    # Cast once, outside the chunks: gradients of all chunks then add up in the accumulation dtype.
    k, v = k.to(dtype), v.to(dtype)
    index_k = None if index_k is None else index_k.to(dtype)

    def attend(rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        keys_seen = visible(rows)
        out, lse, probabilities = _attention(q[rows].to(dtype) * softmax_scale, k, v, keys_seen)
        kl = None
        if index_q is not None and index_k is not None:
            scaled_index_q = index_q[rows].to(dtype) * index_softmax_scale
            kl = _divergence(probabilities.detach(), scaled_index_q, index_k, keys_seen, kl_teacher)
        return out.to(q.dtype), lse, kl

    out, lse, kl = in_query_chunks(
        attend,
        num_queries=q.shape[0],
        bytes_per_query=q.shape[1] * k.shape[0] * dtype.itemsize,
        device=q.device,
        recompute_for_backward=needs_grad,
    )
    assert out is not None
    assert lse is not None
    return AttentionOutput(out, lse, kl)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out [Q, Hq, d_v], lse [Q, Hq] and the probabilities P_h [Hkv, Q, G, K] of scaled queries."""
    grouped_q = q.unflatten(1, (k.shape[1], -1))  # [Q, Hkv, G, d]; group r owns query heads r*G .. r*G+G-1
    visible = visible[:, :, None]  # [Hkv or 1, Q, 1, K]
    sees_any = visible.any(dim=-1)  # [Hkv or 1, Q, 1]

    # With the group in front, the scores come out of one batched matmul without a copy: [Hkv, Q, G, K].
    scores = _hide(torch.einsum("qrgd,krd->rqgk", grouped_q, k), visible)
    probabilities = scores.softmax(dim=-1)
    out = torch.einsum("rqgk,krd->rqgd", probabilities, v).masked_fill(~sees_any[..., None], 0)
    lse = scores.detach().logsumexp(dim=-1).masked_fill(~sees_any, -torch.inf)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2), probabilities


def _divergence(
    probabilities: Tensor, index_q: Tensor, index_k: Tensor, visible: Tensor, kl_teacher: str
) -> Tensor:
    """KL of the index branch S from the attention, per query and group: [Q, Hkv].

    With P_h the attention of head h, P the mean of P_h over the group and S the softmax of the index scores:
    group_mean is KL(P || S) = sum_j P[j] (log P[j] - log S[j]); per_head is mean_h KL(P_h || S), which equals
    KL(P || S) + H(P) - mean_h H(P_h) with the entropy H. Both have the gradient S - P in the index scores.

    Args:
        probabilities: [Hkv, Q, G, K], P_h, detached.
        index_q: [Q, Hkv, d_i], scaled.
        index_k: [K, d_i].
        visible: bool [Hkv or 1, Q, K].
        kl_teacher: "group_mean" or "per_head".
    """
    sees_any = visible.any(dim=-1, keepdim=True)
    teacher = probabilities.mean(dim=2).masked_fill(~sees_any, 0)
    log_student = _hide(torch.einsum("qrd,kd->rqk", index_q, index_k), visible).log_softmax(dim=-1)
    divergence = F.kl_div(log_student, teacher, reduction="none").sum(dim=-1)
    if kl_teacher == "per_head":
        mean_entropy = torch.special.entr(probabilities).sum(dim=-1).mean(dim=-1)
        entropy_of_mean = torch.special.entr(teacher).sum(dim=-1)
        divergence = divergence + (entropy_of_mean - mean_entropy).masked_fill(~sees_any[..., 0], 0)
    return divergence.t()


def _hide(scores: Tensor, visible: Tensor) -> Tensor:
    # The lowest finite number, not -inf: its softmax is exactly 0 all the same, while 0 * log(softmax) stays
    # 0 instead of NaN, and a row that sees nothing stays finite in both directions until it is cleared.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
