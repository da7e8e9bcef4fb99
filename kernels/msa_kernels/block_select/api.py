"""The public op: its meaning, its checks, its choice of backend."""

from __future__ import annotations

from torch import Tensor

from msa_kernels.block_select.reference import block_select_reference
from msa_kernels.common import checks
from msa_kernels.common.backend import Backend, Implementation, Op
from msa_kernels.common.compilation import outside_graphs
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import BlockSelection


def _load_triton() -> Implementation:
    from msa_kernels.block_select.triton_run import IMPLEMENTATION

    return IMPLEMENTATION


_OP = Op(name="block_select", reference=block_select_reference, triton=_load_triton)


@outside_graphs
def block_select(
    index_q: Tensor,
    index_k: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    num_selected_blocks: int,
    softmax_scale: float | None = None,
    with_lse: bool = True,
    score_dtype: checks.ScoreDtype = "input",
    backend: Backend = "auto",
) -> BlockSelection:
    """Chooses, for every query and group, the blocks of keys that attention reads.

    With s[i, j] = index_q[i, r] . index_k[j], the score of a block is the largest s[i, j] over those of its
    tokens that query i sees (arXiv 2606.13392). The block that holds the query, the local block, is always
    taken and uses one of the slots; the others go to the blocks with the best scores. All are taken when the
    query sees no more blocks than there are slots. Equal scores go to the lower block id. The NaN score of a
    token counts as -inf, so that it ranks last. Blocks start at the start of each document.

    The selection has no gradient.

    Args:
        index_q: [Q, groups, d_i], one index query head per group of query heads; bf16, fp16, fp32 or fp64.
        index_k: [K, d_i] or [K, 1, d_i], one index key head for all groups; the dtype of index_q.
        layout: documents of the K keys, document and position of the Q queries.
        block_size: tokens per block.
        num_selected_blocks: slots per query and group, the local block included.
        softmax_scale: factor on the scores in index_lse, 1 / sqrt(d_i) if None; it does not affect block_ids.
        with_lse: compute index_lse. Without it the Triton kernels take about a quarter less time.
        score_dtype: "input" for exact products of the inputs. "e4m3" ranks by scores of index_q and index_k
            rounded to float8_e4m3fn, with a scale per vector: faster, and some blocks differ (README.md has
            measurements). A token whose index_k holds NaN or an infinity then ranks last. It takes
            with_lse=False: what the KL loss is computed from is not rounded.
        backend: "triton", "reference", or "auto" for Triton where it can run.

    Returns:
        block_ids, int32 [Q, groups, num_selected_blocks]: block numbers within the query's document, the
        local block last among the valid entries, -1 behind it. The order of the other entries is free.
        index_lse, fp32 (fp64 for fp64 inputs) [Q, groups]: natural-log logsumexp of softmax_scale * s[i, j]
        over the visible tokens of the selected blocks; NaN where one of those scores is NaN.
        None without with_lse.

    Raises:
        TypeError: wrong type or dtype of an input, or mixed dtypes.
        ValueError: wrong shape, device or value of an input.
        RuntimeError: backend is "triton" and Triton cannot run these inputs.
    """
    checks.check_tensors({"index_q": index_q, "index_k": index_k})
    index_k = checks.check_index_shapes(index_q, index_k)
    checks.check_layout(layout, index_q.shape[0], index_k.shape[0], index_q.device)
    checks.check_count("block_size", block_size)
    checks.check_count("num_selected_blocks", num_selected_blocks)
    checks.check_score_dtype(score_dtype, with_lse)
    return _OP.run(
        backend,
        index_q,
        index_k,
        layout,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        softmax_scale=checks.resolve_scale("softmax_scale", softmax_scale, index_q.shape[2]),
        with_lse=with_lse,
        score_dtype=score_dtype,
    )
