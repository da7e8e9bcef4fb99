"""Block selection in plain PyTorch: the specification of the op.

Letters in shapes: Q queries, K keys, N blocks of all documents, B block size, d_i index head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msa_kernels.block_select import e4m3
from msa_kernels.common.blocks import KeyBlocks
from msa_kernels.common.chunks import in_query_chunks
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.numerics import accumulation_dtype
from msa_kernels.common.outputs import BlockSelection


@torch.no_grad()
def block_select_reference(
    index_q: Tensor,
    index_k: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    num_selected_blocks: int,
    softmax_scale: float,
    with_lse: bool,
    score_dtype: str,
) -> BlockSelection:
    """See ``msa_kernels.block_select``; inputs are checked, index_k is [K, d_i], softmax_scale is given."""
    num_queries, groups, _ = index_q.shape
    dtype = accumulation_dtype(index_q.dtype)
    key_scale = None
    if score_dtype == "e4m3":
        # The scale of a query is left out: it is the same for all scores of a row.
        index_q, _ = e4m3.quantise(index_q)
        index_k, key_scale = e4m3.quantise(index_k)
    blocks = KeyBlocks.build(layout, index_k.shape[0], block_size)
    block_keys = index_k.to(dtype)[blocks.key]  # [N, B, d_i]

    def select(rows: slice) -> tuple[Tensor, Tensor | None]:
        queries = layout.select_queries(rows)
        visible = blocks.visible(queries)[:, None]  # [Q, 1, N, B]
        scores = torch.einsum("qrd,nbd->qrnb", index_q[rows].to(dtype), block_keys)
        if key_scale is not None:
            scores = scores * key_scale[blocks.key]

        # Ranked before scaling: the scale is positive, so all it could do is round two scores into one.
        ranked = visible & ~scores.isnan()
        block_score = scores.masked_fill(~ranked, -torch.inf).amax(dim=-1)
        block_score = blocks.of_own_document(block_score, queries, block_size)
        block_ids = choose_blocks(block_score, queries.query_position // block_size, num_selected_blocks)

        if not with_lse:
            return block_ids.to(torch.int32), None
        # The logsumexp over the tokens of the chosen blocks is the one over those blocks' logsumexps.
        block_lse = (scores * softmax_scale).masked_fill(~visible, -torch.inf).logsumexp(dim=-1)
        block_lse = blocks.of_own_document(block_lse, queries, block_size)
        chosen_lse = block_lse.gather(-1, block_ids.clamp(min=0)).masked_fill(block_ids < 0, -torch.inf)
        return block_ids.to(torch.int32), chosen_lse.logsumexp(dim=-1)

    block_ids, index_lse = in_query_chunks(
        select,
        num_queries=num_queries,
        bytes_per_query=groups * blocks.key.numel() * dtype.itemsize,
        device=index_q.device,
    )
    assert block_ids is not None
    return BlockSelection(block_ids, index_lse)


def choose_blocks(block_score: Tensor, local_block: Tensor, num_selected_blocks: int) -> Tensor:
    """The ids of the best blocks, the local block last, -1 behind: int64 [Q, groups, num_selected_blocks].

    Args:
        block_score: [Q, groups, max_blocks], by block number within the document.
        local_block: int [Q], the number of the block that holds the query.
        num_selected_blocks: slots per query and group, 1 or more.
    """
    local_block = local_block.long()[:, None, None]
    block = torch.arange(block_score.shape[-1], device=block_score.device)
    candidate_score = block_score.masked_fill(block >= local_block, -torch.inf)
    # A stable sort keeps equal scores in the order of their ids. That also puts every candidate, even one
    # whose score is -inf, before the local and the future blocks, whose ids are higher.
    order = candidate_score.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected_blocks]
    order = F.pad(order, (0, num_selected_blocks - order.shape[-1]), value=-1)

    num_others = local_block.clamp(max=num_selected_blocks - 1)
    slot = torch.arange(num_selected_blocks, device=block_score.device)
    return torch.where(slot < num_others, order, torch.where(slot == num_others, local_block, -1))
