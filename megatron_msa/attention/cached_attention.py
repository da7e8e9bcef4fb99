"""Self attention over keys that an inference context keeps: new tokens in, their attention over all out.

Megatron hands its `inference_context` through `GPTModel.forward` to every attention layer. Its own contexts
hold keys and values in the layout of flash-attn's kernels and have no place for index keys, so MSA brings one
(`megatron_msa.inference.context`). Training and evaluation without a context do not come here.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class KeyCacheContext(BaseInferenceContext):
    """What attention layers need of an inference context whose cache has room for index keys.

    One forward pass takes t new tokens of any sequences, as a batch of one, [t, 1, hidden]: a chunk of one or
    more prompts, or one token of each running sequence.
    """

    positions: Tensor
    """int64 [t], the place of each new token of this rank in its sequence."""

    @abstractmethod
    def selects_blocks(self, layer_number: int) -> bool:
        """Whether this layer attends to selected blocks only (layers count from 1)."""

    @abstractmethod
    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        index_query: Tensor | None,
        index_key: Tensor | None,
    ) -> Tensor:
        """Keep the new keys, and attend over everything that each new token may see.

        Args:
            layer_number: from 1.
            query: [t, heads, d], rotated.
            key: [t, groups, d], rotated.
            value: [t, groups, d].
            index_query: [t, groups, d_i], rotated; None where the layer selects no blocks.
            index_key: [t, 1, d_i], rotated; None where the layer selects no blocks.

        Returns:
            [t, heads, d].
        """


class CachedSelfAttention(SelfAttention):
    """Megatron's self attention, for full-attention layers; with a `KeyCacheContext` it uses that cache."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `Attention.forward`."""
        if isinstance(inference_context, KeyCacheContext):
            return forward_with_cache(self, hidden_states, rotary_pos_emb, inference_context)
        return super().forward(
            hidden_states,
            attention_mask,
            key_value_states,
            inference_context,
            rotary_pos_emb,
            *args,
            **kwargs,
        )


def forward_with_cache(
    layer: SelfAttention, hidden_states: Tensor, rotary: Any, context: KeyCacheContext
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of a self-attention layer, MSA or not, over the keys in ``context``.

    Args:
        layer: has an ``index_branch`` if ``context`` lets it select blocks.
        hidden_states: [t, 1, hidden], normalised; with sequence parallelism [t / TP, 1, hidden].
        rotary: tensor with the angles of all positions of a sequence, [positions, 1, 1, dims], or None.
        context: the cache.

    Returns:
        The layer's output, in the shape of ``hidden_states``, and the bias of the output projection.
    """
    gate = None
    if layer.config.attention_output_gate:
        query, key, value, gate = layer.get_query_key_value_tensors(hidden_states, output_gate=True)
    else:
        query, key, value = layer.get_query_key_value_tensors(hidden_states)
    no_rope = layer.config.no_rope_freq
    if rotary is not None:
        rotary = None if no_rope and no_rope[layer.layer_number - 1] else rotary[context.positions]
    index_query = index_key = None
    if context.selects_blocks(layer.layer_number):
        index_query, index_key = layer.index_branch(hidden_states)
        index_query = _rotate(layer, index_query, rotary).squeeze(1)
        index_key = _rotate(layer, index_key, rotary).squeeze(1)
    output = context.attend(
        layer.layer_number,
        _rotate(layer, query, rotary).squeeze(1),
        _rotate(layer, key, rotary).squeeze(1),
        value.squeeze(1),
        index_query=index_query,
        index_key=index_key,
    )
    output = output.flatten(1).unsqueeze(1)
    if gate is not None:
        output = layer._apply_output_gate(output, gate)
    return layer.linear_proj(output)


def _rotate(layer: SelfAttention, x: Tensor, table: Tensor | None) -> Tensor:
    """The rotary embedding of x [t, 1, h, d] with one row of the table per token."""
    if table is None:
        return x
    return apply_rotary_pos_emb(
        x,
        table,
        config=layer.config,
        mscale=layer._yarn_concentration_factor,
        cp_group=layer.pg_collection.cp,
    )
