"""The public op: its meaning, its checks, its choice of backend."""

from __future__ import annotations

from torch import Tensor

from msa_kernels.common import checks
from msa_kernels.common.backend import Backend, Implementation, Op
from msa_kernels.common.compilation import outside_graphs
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import AttentionOutput
from msa_kernels.dense_kl.reference import dense_kl_reference


def _load_triton() -> Implementation:
    from msa_kernels.dense_kl.triton_op import IMPLEMENTATION

    return IMPLEMENTATION


_OP = Op(name="dense_kl", reference=dense_kl_reference, triton=_load_triton)


@outside_graphs
def dense_kl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    index_q: Tensor | None = None,
    index_k: Tensor | None = None,
    softmax_scale: float | None = None,
    index_softmax_scale: float | None = None,
    kl_teacher: checks.KLTeacher = "group_mean",
    backend: Backend = "auto",
) -> AttentionOutput:
    """Full causal attention within documents, and the KL divergence of the index branch from it.

    The op of the indexer warmup: ``sparse_attention`` with every block selected. J is the set of all tokens
    that query i sees, and (arXiv 2606.13392)

        P_h = softmax over J of softmax_scale * q[i, h] . k[j, r]         out[i, h] = sum_j P_h[j] v[j, r]
        P   = mean of P_h over the heads of group r, without gradient
        S   = softmax over J of index_softmax_scale * index_q[i, r] . index_k[j]
        kl[i, r] = KL(P || S) = sum_j P[j] (log P[j] - log S[j])

    The gradient of kl in the scaled index scores is S - P; it reaches index_q and index_k only. Without the
    index inputs this is plain grouped-query attention.

    Args:
        q: [Q, Hq, d], bf16, fp16, fp32 or fp64. Query heads r*G .. r*G+G-1 belong to group r, G = Hq / Hkv.
        k: [K, Hkv, d] in the dtype of q.
        v: [K, Hkv, d_v] in the dtype of q.
        layout: documents of the K keys, document and position of the Q queries.
        index_q: [Q, Hkv, d_i] in the dtype of q; None for attention without KL.
        index_k: [K, d_i] or [K, 1, d_i] in the dtype of q.
        softmax_scale: factor on the main scores, 1 / sqrt(d) if None.
        index_softmax_scale: factor on the index scores, 1 / sqrt(d_i) if None.
        kl_teacher: "group_mean" for KL(P || S), the definition; "per_head" for the mean over h of
            KL(P_h || S), which has the same gradient and is larger by a constant of the teacher.
        backend: "triton", "reference", or "auto" for Triton where it can run.

    Returns:
        out, [Q, Hq, d_v] in the dtype of q.
        lse, fp32 (fp64 for fp64 inputs) [Q, Hq]: natural log of the softmax denominators, no gradient.
        kl, fp32 (fp64 for fp64 inputs) [Q, Hkv]: nats per query and group, neither summed nor divided. None
            without index_q.

    Raises:
        TypeError: wrong type or dtype of an input, or mixed dtypes.
        ValueError: wrong shape, device or value of an input.
        RuntimeError: backend is "triton" and Triton cannot run these inputs.
    """
    checks.check_tensors({"q": q, "k": k, "v": v}, optional={"index_q": index_q, "index_k": index_k})
    checks.check_attention_shapes(q, k, v)
    checks.check_layout(layout, q.shape[0], k.shape[0], q.device)
    checks.check_kl_teacher(kl_teacher)
    index_k, index_head_dim = checks.check_index_branch(q, k, index_q, index_k)
    return _OP.run(
        backend,
        q,
        k,
        v,
        layout,
        index_q=index_q,
        index_k=index_k,
        softmax_scale=checks.resolve_scale("softmax_scale", softmax_scale, q.shape[2]),
        index_softmax_scale=checks.resolve_scale("index_softmax_scale", index_softmax_scale, index_head_dim),
        kl_teacher=kl_teacher,
    )
