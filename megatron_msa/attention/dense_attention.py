"""Full causal attention that knows documents, for layers that Transformer Engine does not serve.

Megatron's own `DotProductAttention` builds the whole score matrix and cannot separate packed documents.
"""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from msa_kernels import dense_kl
from torch import Tensor

from megatron_msa.attention.key_exchange import KeyExchange, kept_as_shards
from megatron_msa.attention.packing import document_layout, from_packed, to_packed, token_layout
from megatron_msa.config import MSATransformerConfig


class DocumentAttention(MegatronModule):
    """A `core_attention` module: exact causal attention within documents, memory bounded by query chunks.

    It takes the arguments Megatron builds core attentions with and needs only the softmax scale and the
    context-parallel group: the mask is causal by construction, and `MSATransformerConfig` refuses dropout.
    """

    def __init__(
        self,
        config: MSATransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group: Any = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each document, causally; the mask and bias arguments are not read.

        Args:
            query: [s, b, h, d]; packed documents: [t, h, d]. Under context parallelism this rank's tokens.
            key: [s, b, groups, d]; packed documents: [t, groups, d].
            value: the shape of ``key``.
            packed_seq_params: where packed documents lie.

        Returns:
            [s, b, h * d]; packed documents: [t, h * d].
        """
        batch_size = None if query.dim() == 3 else query.shape[1]
        tokens = token_layout(query, packed_seq_params, self.config, self.cp_group)
        layout = document_layout(query, packed_seq_params, tokens)
        key, value = to_packed(key), to_packed(value)
        exchange = None
        if tokens is not None:
            exchange = KeyExchange(tokens, self.cp_group)
            key, value = exchange.receive(*exchange.send(key, value))
        with kept_as_shards(exchange):
            result = dense_kl(
                to_packed(query),
                key,
                value,
                layout,
                softmax_scale=self.softmax_scale,
                backend=self.config.msa_backend,
            )
        return from_packed(result.out, batch_size)
