"""`FullSelfAttention`: Megatron's self attention with rotary positions given per token.

Megatron's takes the rotary table of the tokens that its own layouts give a rank. Here each token's row is
picked by its position in its document, whatever layout deals out the tokens (see `context_parallel`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_msa.attention.cached_attention import KeyCacheContext, forward_with_cache
from megatron_msa.attention.context_parallel import TokenLayout, layout_kind
from megatron_msa.attention.dense_attention import DocumentAttention
from megatron_msa.attention.key_exchange import KeyExchange, prefetched_in_backward
from megatron_msa.attention.packing import document_layout, document_offsets, token_layout

type RotaryTable = Tensor | tuple[Tensor | None, Tensor | None] | None


class FullSelfAttention(SelfAttention):
    """A full-attention layer under context parallelism; the base of `MSASelfAttention`.

    Input and output [s, b, hidden] as in Megatron. The rotary table must number the positions of the longest
    document, uncut: `megatron_msa.model` sees to it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._any_layout: DocumentAttention | None = None
        """Stands in for a core attention that cuts the tokens its own way (Transformer Engine's)."""
        if get_pg_size(self.pg_collection.cp) > 1 and not isinstance(self.core_attention, DocumentAttention):
            self._any_layout = DocumentAttention(
                self.config,
                self.layer_number,
                self.attn_mask_type,
                self.attention_type,
                softmax_scale=self.config.softmax_scale,
                pg_collection=self.pg_collection,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any | None = None,
        rotary_pos_emb: RotaryTable = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `Attention.forward`; of inference contexts only a `KeyCacheContext` is accepted.

        Raises:
            NotImplementedError: another inference context or an attention bias was passed.
        """
        if isinstance(inference_context, KeyCacheContext):
            return forward_with_cache(self, hidden_states, rotary_pos_emb, inference_context)
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError(
                f"{type(self).__name__} takes the inference cache of megatron_msa.inference only: a context "
                "of Megatron's has no index keys"
            )
        if attention_bias is not None:
            raise NotImplementedError(f"{type(self).__name__} takes no attention bias")
        gate = None
        if self.config.attention_output_gate:
            query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
        if document_offsets(packed_seq_params) is not None:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        tokens = token_layout(query, packed_seq_params, self.config, self.pg_collection.cp)
        tables = self._rotary_tables(rotary_pos_emb, query, packed_seq_params, tokens)
        output, exchange = self._attention(
            hidden_states, query, key, value, tables, packed_seq_params, tokens
        )
        if output.dim() == 2:
            output = output.unsqueeze(1)
        if gate is not None:
            output = self._apply_output_gate(output, gate)
        output, bias = self.linear_proj(output)
        if exchange is not None:  # the keys come back while the output projection's gradients are computed
            output = prefetched_in_backward(output, exchange)
        return output, bias

    def _attention(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tables: tuple[Tensor | None, Tensor | None],
        packed_seq_params: PackedSeqParams | None,
        tokens: TokenLayout | None,
    ) -> tuple[Tensor, KeyExchange | None]:
        """From the projections to the input of the output projection.

        Args:
            hidden_states: the layer's input.
            query: [s, b, h, d] or [t, h, d], before the rotary embedding; ``key`` and ``value`` alike.
            tables: rotary embeddings of this rank's tokens, for queries and for keys.
            packed_seq_params: where packed documents lie.
            tokens: whose tokens are whose; None without context parallelism.

        Returns:
            [s, b, h * d] or [t, h * d], and the exchange whose keys the backward pass gathers again, if any.
        """
        query, key = self._rotate(query, tables[0]), self._rotate(key, tables[1])
        return self._core_attention(query, key, value, packed_seq_params), None

    def _core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed_seq_params: PackedSeqParams | None,
        extra: dict[str, Any] | None = None,
    ) -> Tensor:
        """`_run_core_attention` with the tensors and objects in ``extra``, recomputed if the run says so."""
        if self.checkpoint_core_attention and self.training:
            return self._checkpointed_attention_forward(
                query,
                key,
                value,
                None,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
                core_attention_extra_kwargs=extra,
            )
        return self._run_core_attention(
            query,
            key,
            value,
            None,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
            **(extra or {}),
        )

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **extra: Any,
    ) -> Tensor:
        """Megatron's hook: also what `_checkpointed_attention_forward` recomputes."""
        if self._any_layout is not None and not self._knows_layout(packed=query.dim() == 3):
            return self._any_layout(query, key, value, None, packed_seq_params=packed_seq_params)
        return super()._run_core_attention(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **extra
        )

    def _knows_layout(self, *, packed: bool) -> bool:
        """Whether Transformer Engine's context parallelism cuts the tokens as ours does."""
        kind = layout_kind(self.config.msa_cp_layout, packed=packed)
        return kind == ("documents" if packed else "zigzag")

    def _rotary_tables(
        self,
        embedding: RotaryTable,
        query: Tensor,
        packed_seq_params: PackedSeqParams | None,
        tokens: TokenLayout | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The rows of the rotary embedding [s or t, 1, 1, rotary] of this rank's queries, and of its keys."""
        if embedding is None or (
            self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        ):
            return None, None
        for_query, for_key = embedding if isinstance(embedding, tuple) else (embedding, embedding)
        if query.dim() == 4 and tokens is None:
            return for_query, for_key
        # Of a plain batch, where every sequence has the same positions, those of the first.
        positions = document_layout(query, packed_seq_params, tokens).query_position[: query.shape[0]]
        rows = None if for_query is None else for_query[positions]
        if for_key is for_query:
            return rows, rows
        return rows, None if for_key is None else for_key[positions]

    def _rotate(self, x: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            return x
        # Megatron wants [s, b, h, d]: packed tokens are a batch of one. No offsets, the rows are picked.
        rotated = apply_rotary_pos_emb(
            x if x.dim() == 4 else x.unsqueeze(1),
            table,
            config=self.config,
            mscale=self._yarn_concentration_factor,
            cp_group=self.pg_collection.cp,
        )
        return rotated if x.dim() == 4 else rotated.squeeze(1)
