"""Between Megatron's tensor layouts and the packed layout of `msa_kernels`.

Shape legend: s sequence, b micro-batch, t = s * b packed tokens (batch-major), h heads, d head dimension.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from msa_kernels import DocumentLayout
from torch import Tensor


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


def document_layout(query: Tensor, packed_seq_params: PackedSeqParams | None) -> DocumentLayout:
    """The documents of one micro-batch, where every key is also a query.

    Args:
        query: [s, b, h, d] for a plain batch, where each sequence is one document; [t, h, d] for packed ones.
        packed_seq_params: where the packed documents lie.
    """
    offsets = document_offsets(packed_seq_params)
    if packed_seq_params is None or offsets is None:
        sequence, batch = query.shape[:2]
        return _dense_batch_layout(batch, sequence, query.device)
    # One layout serves every layer of the micro-batch: the parameter object is the natural place to keep it.
    layout = getattr(packed_seq_params, "msa_document_layout", None)
    if layout is None:
        layout = DocumentLayout.from_document_offsets(
            offsets, max_document_length=packed_seq_params.max_seqlen_q, num_keys=query.shape[0]
        )
        packed_seq_params.msa_document_layout = layout  # type: ignore[attr-defined]
    return layout


@lru_cache(maxsize=8)
def _dense_batch_layout(batch: int, sequence: int, device: torch.device) -> DocumentLayout:
    # Autograd cannot save tensors made in inference mode, and training may get this layout after evaluation.
    with torch.inference_mode(False):
        return DocumentLayout.dense_batch(batch, sequence, device=device)
