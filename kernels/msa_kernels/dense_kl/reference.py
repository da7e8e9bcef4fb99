"""Full causal attention with the KL of the warmup phase in plain PyTorch: the specification of the op."""

from __future__ import annotations

from torch import Tensor

from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.masked_attention import masked_attention
from msa_kernels.common.outputs import AttentionOutput


def dense_kl_reference(
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
    return masked_attention(
        q,
        k,
        v,
        lambda rows: layout.select_queries(rows).visible_keys(k.shape[0])[None],
        index_q=index_q,
        index_k=index_k,
        softmax_scale=softmax_scale,
        index_softmax_scale=index_softmax_scale,
        kl_teacher=kl_teacher,
    )
