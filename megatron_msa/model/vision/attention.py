"""Attention of the encoder: every patch to every patch of its segment, and to no other.

Megatron's `DotProductAttention` knows no packing, and a mask would cost the square of all patches together.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_msa.model.vision.segments import PackedSegments


class SegmentAttention(MegatronModule):
    """A `core_attention` module. Memory grows with the patches, not with their square.

    On a GPU in 16 bit one call of PyTorch's variable-length flash attention; otherwise PyTorch's fused
    attention, once for each run of equally long segments.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments) -> Tensor:
        """[patches, heads, d] each -> [patches, heads * d]."""
        if _has_varlen_kernel(query):
            return _varlen(query, key, value, segments).flatten(1)
        return by_runs(query, key, value, segments.lengths).flatten(1)


def by_runs(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention within segments of these lengths, on any device and in any dtype: [patches, heads, d]."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    ends = list(accumulate(length * count for length, count in runs))
    outputs = []
    for (length, count), end in zip(runs, ends, strict=True):
        start = end - length * count
        q, k, v = (
            x[start:end].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)
        )
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _has_varlen_kernel(query: Tensor) -> bool:
    # The head dimensions that FlashAttention-2 takes.
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), offsets, offsets, longest, longest
    )


class VisionSelfAttention(SelfAttention):
    """Megatron's self attention with rotary angles of every patch; input and output [patches, 1, c]."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSegments,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `Attention.forward`; other arguments of a layer (caches, masks) are None here."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = (
            apply_rotary_pos_emb(x, rotary_pos_emb, self.config, cp_group=self.pg_collection.cp)
            for x in (query, key)
        )
        output = self.core_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), packed_seq_params)
        return self.linear_proj(output.unsqueeze(1))
