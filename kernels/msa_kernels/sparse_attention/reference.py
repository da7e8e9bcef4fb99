"""Attention over selected blocks in plain PyTorch: the specification of the op.

Letters in shapes: Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.masked_attention import masked_attention
from msa_kernels.common.outputs import AttentionOutput


def sparse_attention_reference(
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

    ``index_lse`` is not read: the reference normalises the index branch itself, so that an error in the
    hand-over from block_select cannot hide here.
    """
    num_keys = k.shape[0]

    def visible(rows: slice) -> Tensor:
        queries = layout.select_queries(rows)
        selected = _of_selected_blocks(block_ids[rows], queries, num_keys, block_size)
        return selected & queries.visible_keys(num_keys)

    return masked_attention(
        q,
        k,
        v,
        visible,
        index_q=index_q,
        index_k=index_k,
        softmax_scale=softmax_scale,
        index_softmax_scale=index_softmax_scale,
        kl_teacher=kl_teacher,
    )


def _of_selected_blocks(block_ids: Tensor, queries: DocumentLayout, num_keys: int, block_size: int) -> Tensor:
    """Whether a key's block number is one that a query selected, in any document: bool [groups, Q, K]."""
    block = torch.arange(queries.max_blocks(block_size), dtype=torch.int32, device=block_ids.device)
    selected = (block_ids[..., None] == block).any(dim=2)  # [Q, groups, max_blocks]
    key_block = queries.key_position(num_keys) // block_size
    return selected.transpose(0, 1)[..., key_block]
