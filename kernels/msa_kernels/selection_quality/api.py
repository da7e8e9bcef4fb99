"""The public function: its meaning and its checks."""

from __future__ import annotations

from torch import Tensor

from msa_kernels.common import checks, value_checks
from msa_kernels.common.compilation import outside_graphs
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import SelectionQuality
from msa_kernels.selection_quality.reference import selection_quality_reference


@outside_graphs
def selection_quality(
    q: Tensor,
    k: Tensor,
    block_ids: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    index_q: Tensor,
    index_k: Tensor,
    softmax_scale: float | None = None,
    index_softmax_scale: float | None = None,
) -> SelectionQuality:
    """How well the selected blocks cover what full attention looks at (arXiv 2606.13392).

    For query i and group r, I is the set of selected blocks, and the mass of a block is the probability that
    full causal attention puts on its tokens, averaged over the heads of the group. I* is the set of the k
    visible blocks with the largest mass (all of them if there are fewer; equal masses go to the lower block
    id; the local block is not forced), k = block_ids.shape[2].

        block_recall = |I* n I| / |I*|          score_recall = mass of I* n I / mass of I*

    With w[b] the probability of the index branch, softmax over the visible tokens of I, summed over the
    tokens of block b: selection_entropy = - sum_b w[b] log w[b], local_block_share = w[local block],
    first_block_share = w[0], 0 if block 0 is not selected.

    It costs full attention scores for the queries given, so pass a sample: rows of q, index_q and block_ids
    and ``layout.select_queries`` of the same rows. There is no gradient, and one implementation, in PyTorch.

    Args:
        q: [Q, Hq, d], bf16, fp16, fp32 or fp64. Query heads r*G .. r*G+G-1 belong to group r, G = Hq / Hkv.
        k: [K, Hkv, d] in the dtype of q.
        block_ids: int32 [Q, Hkv, k] from ``block_select``.
        layout: documents of the K keys, document and position of the Q queries.
        block_size: tokens per block, the one that block_ids were made with.
        index_q: [Q, Hkv, d_i] in the dtype of q.
        index_k: [K, d_i] or [K, 1, d_i] in the dtype of q.
        softmax_scale: factor on the main scores, 1 / sqrt(d) if None.
        index_softmax_scale: factor on the index scores, 1 / sqrt(d_i) if None.

    Returns:
        Five tensors [Q, Hkv], fp32 (fp64 for fp64 inputs), and drops_blocks, bool [Q]: the query sees more
        than k blocks. Average recalls over those rows only; elsewhere everything is selected.

    Raises:
        TypeError: wrong type or dtype of an input, or mixed dtypes.
        ValueError: wrong shape, device or value of an input.
    """
    checks.check_tensors({"q": q, "k": k, "index_q": index_q, "index_k": index_k})
    checks.check_query_key_shapes(q, k)
    checks.check_layout(layout, q.shape[0], k.shape[0], q.device)
    checks.check_count("block_size", block_size)
    checks.check_block_ids(block_ids, q.shape[0], k.shape[1], q.device)
    value_checks.check_block_id_values(block_ids, layout, block_size)
    shared_index_k, index_head_dim = checks.check_index_branch(q, k, index_q, index_k)
    assert shared_index_k is not None
    return selection_quality_reference(
        q,
        k,
        block_ids,
        layout,
        block_size=block_size,
        index_q=index_q,
        index_k=shared_index_k,
        softmax_scale=checks.resolve_scale("softmax_scale", softmax_scale, q.shape[2]),
        index_softmax_scale=checks.resolve_scale("index_softmax_scale", index_softmax_scale, index_head_dim),
    )
