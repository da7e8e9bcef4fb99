"""Between Megatron's tensor layouts and the packed layout of `msa_kernels`.

Shape legend: s sequence, b micro-batch, t = s * b packed tokens (batch-major), h heads, d head dimension,
C context-parallel ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_pg_rank, get_pg_size
from msa_kernels import DocumentLayout
from torch import Tensor

from megatron_msa.attention.context_parallel import TokenLayout, batch_layout, packed_layout
from megatron_msa.config import MSATransformerConfig


def to_packed(x: Tensor) -> Tensor:
    """[s, b, h, d] -> [t, h, d], batch-major, so that each sequence is contiguous; [t, h, d] stays."""
    if x.dim() == 3:
        return x
    sequence, batch, heads, dim = x.shape
    return x.transpose(0, 1).reshape(batch * sequence, heads, dim)


def from_packed(x: Tensor, batch_size: int | None) -> Tensor:
    """[t, h, d] -> [s, b, h * d]; with ``batch_size`` None (packed documents) -> [t, h * d]."""
    tokens, heads, dim = x.shape
    if batch_size is None:
        return x.reshape(tokens, heads * dim)
    return x.reshape(batch_size, tokens // batch_size, heads * dim).transpose(0, 1).contiguous()


def document_offsets(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """Start of each packed document and, last, the number of tokens: int32 [documents + 1]. None: not packed.

    The padded offsets where there are any: they are where the documents lie. Padding stands behind its
    document's tokens, where causal attention cannot see it.
    """
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def token_layout(
    query: Tensor, packed_seq_params: PackedSeqParams | None, config: MSATransformerConfig, group: Any
) -> TokenLayout | None:
    """Which tokens of the microbatch are whose under context parallelism; None without it.

    Args:
        query: this rank's, [s / C, b, h, d] for a plain batch; [t / C, h, d] for packed documents.
        packed_seq_params: where the packed documents lie, all of them.
        config: of the layer.
        group: the context-parallel process group.
    """
    size = get_pg_size(group)
    if size == 1:
        return None
    rank = get_pg_rank(group)
    offsets = document_offsets(packed_seq_params)
    if packed_seq_params is None or offsets is None:
        length, batch = query.shape[0] * size, query.shape[1]
        return batch_layout(
            config.msa_cp_layout, batch=batch, length=length, size=size, rank=rank, device=query.device
        )
    return attached_token_layout(packed_seq_params, config.msa_cp_layout, samples=1, size=size, rank=rank)


def attached_token_layout(
    packed_seq_params: PackedSeqParams, setting: str, *, samples: int, size: int, rank: int
) -> TokenLayout:
    """The layout of packed documents: made once per microbatch, since it reads the offsets on the host."""
    # One layout serves every layer of the microbatch: the parameter object is the natural place to keep it.
    layout = getattr(packed_seq_params, "msa_token_layout", None)
    if layout is None:
        offsets = document_offsets(packed_seq_params)
        assert offsets is not None
        layout = packed_layout(
            setting, offsets.tolist(), samples=samples, size=size, rank=rank, device=offsets.device
        )
        packed_seq_params.msa_token_layout = layout  # type: ignore[attr-defined]
    return layout


def document_layout(
    query: Tensor, packed_seq_params: PackedSeqParams | None, tokens: TokenLayout | None = None
) -> DocumentLayout:
    """The documents of one microbatch and the queries of this rank.

    Args:
        query: this rank's, [s / C, b, h, d] for a plain batch, where each sequence is one document;
            [t / C, h, d] for packed ones.
        packed_seq_params: where the packed documents lie.
        tokens: whose tokens are whose under context parallelism; None where every key is also a query.
    """
    offsets = document_offsets(packed_seq_params)
    size = 1 if tokens is None else tokens.size
    if packed_seq_params is None or offsets is None:
        sequence, batch = query.shape[:2]
        return _dense_batch_layout(batch, sequence * size, query.device, tokens)
    layout = getattr(packed_seq_params, "msa_document_layout", None)
    if layout is None:
        layout = DocumentLayout.from_document_offsets(
            offsets, max_document_length=packed_seq_params.max_seqlen_q, num_keys=query.shape[0] * size
        )
        if tokens is not None:
            layout = layout.select_queries(tokens.local)
        packed_seq_params.msa_document_layout = layout  # type: ignore[attr-defined]
    return layout


@lru_cache(maxsize=8)
def _dense_batch_layout(
    batch: int, sequence: int, device: torch.device, tokens: TokenLayout | None
) -> DocumentLayout:
    # Autograd cannot save tensors made in inference mode, and training may get this layout after evaluation.
    with torch.inference_mode(False):
        layout = DocumentLayout.dense_batch(batch, sequence, device=device)
        return layout if tokens is None else layout.select_queries(tokens.local)
