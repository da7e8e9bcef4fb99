"""Attention by cuDNN, as it comes with PyTorch: every key is also a query, all documents are equally long.

Letters in shapes: T tokens, Hq query heads, Hkv groups, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout

# Shorter documents leave nothing to gain, and cuDNN has special rules for very short ones.
MIN_LENGTH = 128

type LibraryAttention = Callable[[Tensor, Tensor, Tensor, DocumentLayout, float], tuple[Tensor, Tensor]]


def choose_library(q: Tensor, k: Tensor, layout: DocumentLayout) -> LibraryAttention | None:
    """The fastest library kernel for these inputs; None where there is none.

    It takes q [T, Hq, d], k and v [T, Hkv, d], the layout and the softmax scale, and returns out [T, Hq, d]
    and lse fp32 [T, Hq], natural log. Autograd knows its backward pass.
    """
    if not q.is_cuda or not layout.queries_are_keys or layout.max_document_length < MIN_LENGTH:
        return None
    # cuDNN's backward pass adds dq up in an order that changes from run to run.
    if torch.are_deterministic_algorithms_enabled():
        return None
    if k.shape[0] == layout.num_documents * layout.max_document_length:
        # No document is longer than the maximum, so all have that length: a plain batch.
        return _cudnn_plain_batch
    return None


def _cudnn_plain_batch(
    q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    batch = layout.num_documents
    heads_first = (tensor.unflatten(0, (batch, -1)).transpose(1, 2) for tensor in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, is_causal=True, scale=softmax_scale
    )
    lse = lse.detach().reshape(batch, q.shape[1], -1)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1).contiguous()
