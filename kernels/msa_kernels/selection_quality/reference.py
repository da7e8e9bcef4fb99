"""Quality metrics of a selection in plain PyTorch.

Letters in shapes: Q queries, K keys, Hkv groups, G query heads per group, N blocks of all documents, B block
size, k selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_kernels.common.blocks import KeyBlocks
from msa_kernels.common.chunks import in_query_chunks
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.numerics import accumulation_dtype
from msa_kernels.common.outputs import SelectionQuality


@torch.no_grad()
def selection_quality_reference(
    q: Tensor,
    k: Tensor,
    block_ids: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    index_q: Tensor,
    index_k: Tensor,
    softmax_scale: float,
    index_softmax_scale: float,
) -> SelectionQuality:
    """See ``msa_kernels.selection_quality``; inputs are checked, index_k is [K, d_i], scales are given."""
    dtype = accumulation_dtype(q.dtype)
    blocks = KeyBlocks.build(layout, k.shape[0], block_size)
    block_keys = k.to(dtype)[blocks.key]  # [N, B, Hkv, d]
    block_index_keys = index_k.to(dtype)[blocks.key]  # [N, B, d_i]

    def measure(rows: slice) -> SelectionQuality:
        queries = layout.select_queries(rows)
        ids = block_ids[rows].long()
        local_block = (queries.query_position // block_size).long()
        visible = blocks.visible(queries)  # [Q, N, B]

        mass = _block_mass(q[rows].to(dtype) * softmax_scale, block_keys, visible)
        mass = blocks.of_own_document(mass, queries, block_size)  # [Q, Hkv, max_blocks]
        block_recall, score_recall = _recall(mass, ids, local_block)

        index_scores = torch.einsum("qrd,nbd->qrnb", index_q[rows].to(dtype), block_index_keys)
        index_scores = (index_scores * index_softmax_scale).masked_fill(~visible[:, None], -torch.inf)
        block_lse = blocks.of_own_document(index_scores.logsumexp(dim=-1), queries, block_size)
        # Softmax over the selected blocks' logsumexps is the token softmax, summed per block: [Q, Hkv, k].
        taken = block_lse.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        share = taken.softmax(dim=-1).masked_fill(ids < 0, 0)
        return SelectionQuality(
            block_recall=block_recall,
            score_recall=score_recall,
            selection_entropy=torch.special.entr(share).sum(dim=-1),
            local_block_share=share.masked_fill(ids != local_block[:, None, None], 0).sum(dim=-1),
            first_block_share=share.masked_fill(ids != 0, 0).sum(dim=-1),
            drops_blocks=local_block + 1 > ids.shape[-1],
        )

    columns = in_query_chunks(
        measure,
        num_queries=q.shape[0],
        bytes_per_query=q.shape[1] * blocks.key.numel() * dtype.itemsize,
        device=q.device,
    )
    return SelectionQuality(*columns)


def _block_mass(q: Tensor, block_keys: Tensor, visible: Tensor) -> Tensor:
    """Full causal attention, averaged over the heads of a group and summed per block: [Q, Hkv, N]."""
    grouped_q = q.unflatten(1, (block_keys.shape[2], -1))  # [Q, Hkv, G, d]
    scores = torch.einsum("qrgd,nbrd->rqgnb", grouped_q, block_keys)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    probabilities = scores.flatten(-2).softmax(dim=-1).unflatten(-1, visible.shape[1:])
    return probabilities.mean(dim=2).sum(dim=-1).transpose(0, 1)


def _recall(mass: Tensor, block_ids: Tensor, local_block: Tensor) -> tuple[Tensor, Tensor]:
    """Block recall and score recall, each [Q, Hkv].

    Args:
        mass: [Q, Hkv, max_blocks], attention probability by block number within the document.
        block_ids: int64 [Q, Hkv, k], the selection.
        local_block: int64 [Q], the number of the block that holds the query.
    """
    block = torch.arange(mass.shape[-1], device=mass.device)
    mass = mass.masked_fill(block > local_block[:, None, None], -1)  # blocks the query does not see rank last
    selected = (block_ids[..., None] == block).any(dim=2)  # [Q, Hkv, max_blocks]
    # The stable sort gives equal masses to the lower id.
    ranking = mass.sort(dim=-1, descending=True, stable=True)
    best_mass, best = (column[..., : block_ids.shape[-1]] for column in ranking)
    counts = torch.arange(best.shape[-1], device=mass.device) <= local_block[:, None, None]
    found = selected.gather(-1, best) & counts
    best_mass = best_mass.masked_fill(~counts, 0)
    block_recall = found.sum(dim=-1) / counts.sum(dim=-1).to(mass.dtype)
    score_recall = best_mass.masked_fill(~found, 0).sum(dim=-1) / best_mass.sum(dim=-1)
    return block_recall, score_recall
