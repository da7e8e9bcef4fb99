"""Full causal attention that knows documents, for layers that Transformer Engine does not serve.

Megatron's own `DotProductAttention` builds the whole score matrix and cannot separate packed documents.
"""

from __future__ import annotations

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from msa_kernels import dense_kl
from torch import Tensor

from megatron_msa.attention.packing import document_layout, from_packed, to_packed
from megatron_msa.config import MSATransformerConfig


class DocumentAttention(MegatronModule):
    """A `core_attention` module: exact causal attention within documents, memory bounded by query chunks.

    It takes the arguments Megatron builds core attentions with and needs the softmax scale only: the mask is
    causal by construction, and `MSATransformerConfig` refuses dropout and context parallelism.
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
            query: [s, b, h, d]; packed documents: [t, h, d].
            key: [s, b, groups, d]; packed documents: [t, groups, d].
            value: the shape of ``key``.
            packed_seq_params: where packed documents lie.

        Returns:
            [s, b, h * d]; packed documents: [t, h * d].
        """
        batch_size = None if query.dim() == 3 else query.shape[1]
        result = dense_kl(
            to_packed(query),
            to_packed(key),
            to_packed(value),
            document_layout(query, packed_seq_params),
            softmax_scale=self.softmax_scale,
            backend=self.config.msa_backend,
        )
        return from_packed(result.out, batch_size)
