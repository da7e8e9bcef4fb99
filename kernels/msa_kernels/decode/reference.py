"""Decoding over a paged cache in plain PyTorch: the specification of the ops.

One sequence after the other, so that nothing is larger than what one of them attends to. No value is read
from the device: all pages of the table are gathered, and those behind the length are hidden.

Letters in shapes: S sequences, q_len new tokens per sequence, N most pages of a sequence, B block size, G
heads per group, d head dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_kernels.block_select.reference import choose_blocks
from msa_kernels.common.numerics import accumulation_dtype
from msa_kernels.decode.checks import EIGHT_BIT, query_positions


@torch.no_grad()
def decode_select_reference(
    index_query: Tensor,
    index_key_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    index_key_scale: Tensor | None,
) -> Tensor:
    """See ``msa_kernels.decode_select``; inputs are checked."""
    sequences, q_len, groups, _ = index_query.shape
    dtype = accumulation_dtype(index_query.dtype)
    block_size = index_key_cache.shape[1]
    pages = _used_pages(page_table, lengths, block_size)
    local_block = query_positions(lengths, q_len) // block_size
    block_ids = torch.empty(sequences, q_len, groups, top_k, dtype=torch.int32, device=index_query.device)
    for sequence in range(sequences):
        keys = _take(index_key_cache, (pages[sequence],)).to(dtype)  # [N, B, d_i]
        with torch.autocast(keys.device.type, enabled=False):
            scores = torch.einsum("qrd,nbd->qrnb", index_query[sequence].to(dtype), keys)
        if index_key_scale is not None:
            scores = scores * index_key_scale[pages[sequence]]
        # Blocks before the local one are visible as a whole; the others do not compete.
        block_score = scores.masked_fill(scores.isnan(), -torch.inf).amax(dim=-1)
        block_ids[sequence] = choose_blocks(block_score, local_block[sequence], top_k)
    return block_ids


@torch.no_grad()
def decode_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    block_ids: Tensor | None,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    """See ``msa_kernels.decode_attention``; inputs are checked, scale is given."""
    sequences, q_len, heads, _ = query.shape
    groups, block_size = key_cache.shape[1:3]
    pages = _used_pages(page_table, lengths, block_size)
    position = query_positions(lengths, q_len)
    every_block = torch.arange(pages.shape[1], device=query.device).expand(1, groups, -1)
    output = query.new_empty(sequences, q_len, heads, value_cache.shape[3])
    for sequence in range(sequences):
        blocks = every_block if block_ids is None else block_ids[sequence]
        keys, token = _rows(key_cache, key_scale, pages[sequence], blocks, lengths[sequence], query.dtype)
        values, _ = _rows(value_cache, value_scale, pages[sequence], blocks, lengths[sequence], query.dtype)
        is_visible = (token >= 0) & (token <= position[sequence, :, None, None])
        output[sequence] = _attend(query[sequence], keys, values, is_visible, scale).to(query.dtype)
    return output


def _attend(query: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor, scale: float) -> Tensor:
    """[q_len, heads, d_v] of query [q_len, heads, d], keys and values [q_len or 1, groups, T, dim] and
    is_visible, bool [q_len, groups, T]; a query that sees no token gets 0."""
    grouped = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # [q_len, groups, G, d]
    with torch.autocast(keys.device.type, enabled=False):
        scores = (grouped @ keys.transpose(-1, -2)) * scale
        hidden = ~is_visible[:, :, None]
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return (weights.masked_fill(hidden, 0) @ values).flatten(1, 2)


def _rows(
    cache: Tensor, scale: Tensor | None, pages: Tensor, blocks: Tensor, length: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The rows of some blocks of a sequence, and the positions of their tokens.

    Args:
        cache: [pages, groups, B, dim].
        scale: fp32 [pages, groups, B] or None.
        pages: int64 [N], of the sequence.
        blocks: int [n, groups, k], -1 where there is none.
        length: of the sequence, a tensor without dimensions.
        dtype: of the queries.

    Returns:
        [n, groups, k * B, dim] in the accumulation dtype of ``dtype``, 0 where there is no token, whatever
        the cache holds there; and int [n, groups, k * B], -1 where there is no token.
    """
    groups, block_size = cache.shape[1:3]
    group = torch.arange(groups, device=cache.device)[:, None]
    place = (pages[blocks.clamp(min=0).long()], group)
    rows = _take(cache, place).to(accumulation_dtype(dtype))
    if scale is not None:
        rows = rows * scale[place][..., None]
    token = blocks[..., None] * block_size + torch.arange(block_size, device=cache.device)
    exists = (blocks >= 0)[..., None] & (token < length)
    rows = rows.masked_fill(~exists[..., None], 0)
    return rows.flatten(2, 3), token.where(exists, -1).flatten(2)


def _used_pages(page_table: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """int64 [S, N]: the page table, 0 behind the last page of a sequence."""
    block = torch.arange(page_table.shape[1], device=page_table.device)
    return page_table.where(block * block_size < lengths[:, None], 0).long()


def _take(cache: Tensor, place: tuple[Tensor, ...]) -> Tensor:
    if cache.dtype == EIGHT_BIT:  # PyTorch cannot index it everywhere
        return cache.view(torch.uint8)[place].view(EIGHT_BIT)
    return cache[place]
