"""`MSASelfAttention`: Megatron's self attention with an index branch, block selection and the KL loss.

    hidden states -> q, k, v                      (Megatron: QKV projection, q/k norm, RoPE)
    sg(hidden states) -> index_q, index_k         (index branch, same norm and RoPE)
    index_q, index_k -> block ids                 (sparse phase)
    q, k, v, block ids -> output, KL              (KL attached to the output for the backward pass)
    output -> output projection

What runs is decided by `phase`, which the training loop sets (see `megatron_msa.phases`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.utils import get_pg_size
from msa_kernels import block_select, dense_kl, selection_quality, sparse_attention
from torch import Tensor

from megatron_msa.attention.index_branch import IndexBranch, IndexBranchSubmodules
from megatron_msa.attention.kl_loss import attach_loss, kl_objective, set_loss_scale
from megatron_msa.attention.layer_metrics import QUALITY_NAMES, LayerMetrics
from megatron_msa.attention.packing import document_layout, document_offsets, from_packed, to_packed
from megatron_msa.config import MSATransformerConfig
from megatron_msa.phases import Phase


@dataclass
class MSASelfAttentionSubmodules(SelfAttentionSubmodules):
    """Megatron's self-attention submodules and those of the index branch."""

    index_branch: IndexBranchSubmodules | None = None


class MSASelfAttention(SelfAttention):
    """Self attention of one MSA layer; input and output [s, b, hidden] as in Megatron."""

    def __init__(
        self, config: MSATransformerConfig, submodules: MSASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        assert submodules.index_branch is not None, "the layer spec must name the index branch's submodules"
        self.index_branch = IndexBranch(config, submodules.index_branch, self.pg_collection)
        # Here, not where the model is built: without it the schedules would leave the KL unscaled, silently.
        config.experimental_attention_variant_loss_scale_func = set_loss_scale
        self.phase = config.phase_schedule().phases[0]
        self.metrics = LayerMetrics()
        self.sample_quality = False
        """Measure the selection in the next forward pass that computes the KL loss, then turn itself off."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See Megatron's `Attention.forward`; inference contexts are not accepted here.

        Raises:
            NotImplementedError: an inference context or an attention bias was passed.
        """
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("MSASelfAttention has no inference cache; run the full forward pass")
        if attention_bias is not None:
            raise NotImplementedError("MSASelfAttention takes no attention bias")
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            rotary_pos_emb = None

        gate = None
        if self.config.attention_output_gate:
            query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
        index: dict[str, Tensor] = {}
        if self.phase.has_kl:
            index["index_query"], index["index_key"] = self.index_branch(hidden_states)

        offsets = document_offsets(packed_seq_params)
        if offsets is not None:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            index = {name: x.squeeze(1) for name, x in index.items()}
        if rotary_pos_emb is not None:
            q_emb, k_emb = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
            query = self._rotate(query, q_emb, offsets)
            key = self._rotate(key, k_emb, offsets)
            if index:
                index["index_query"] = self._rotate(index["index_query"], q_emb, offsets)
                index["index_key"] = self._rotate(index["index_key"], k_emb, offsets)
        if self.phase is Phase.SPARSE:
            # Outside the recomputed region: selective recomputation replays the saved selection.
            index |= self._select(index["index_query"], index["index_key"], packed_seq_params)

        if self.checkpoint_core_attention and self.training:
            output = self._checkpointed_attention_forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
                core_attention_extra_kwargs=index,
            )
        else:
            output = self._run_core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
                **index,
            )
        if offsets is not None:
            output = output.reshape(output.size(0), 1, -1)
        if gate is not None:
            output = self._apply_output_gate(output, gate)
        return self.linear_proj(output)

    def _rotate(self, x: Tensor, embedding: Tensor | None, offsets: Tensor | None) -> Tensor:
        if embedding is None:
            return x
        return apply_rotary_pos_emb(
            x,
            embedding,
            config=self.config,
            cu_seqlens=offsets,
            mscale=self._yarn_concentration_factor,
            cp_group=self.pg_collection.cp,
        )

    def _select(
        self, index_query: Tensor, index_key: Tensor, packed_seq_params: PackedSeqParams | None
    ) -> dict[str, Tensor]:
        selection = block_select(
            to_packed(index_query),
            to_packed(index_key),
            document_layout(index_query, packed_seq_params),
            block_size=self.config.msa_block_size,
            num_selected_blocks=self.config.msa_num_selected_blocks,
            backend=self.config.msa_backend,
        )
        return {"block_ids": selection.block_ids, "index_lse": selection.index_lse}

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        index_query: Tensor | None = None,
        index_key: Tensor | None = None,
        block_ids: Tensor | None = None,
        index_lse: Tensor | None = None,
    ) -> Tensor:
        """Megatron's hook: also what `_checkpointed_attention_forward` recomputes."""
        if index_query is None:
            output = super()._run_core_attention(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
            return self._touch_index_branch(output)
        assert index_key is not None

        layout = document_layout(query, packed_seq_params)
        batch_size = None if query.dim() == 3 else query.shape[1]
        q, k, v = to_packed(query), to_packed(key), to_packed(value)
        index_q, index_k = to_packed(index_query), to_packed(index_key)
        # In the first, gradient-free pass of activation recomputation and in evaluation there is nothing to
        # train and nothing to count; the pass that records gradients does both exactly once.
        with_kl = self.training and torch.is_grad_enabled()
        kl_inputs = {"index_q": index_q, "index_k": index_k} if with_kl else {}
        common = {"softmax_scale": self.config.softmax_scale, "backend": self.config.msa_backend, **kl_inputs}
        if block_ids is None:
            result = dense_kl(q, k, v, layout, **common)
        else:
            if with_kl:
                common["index_lse"] = index_lse
            result = sparse_attention(
                q, k, v, block_ids, layout, block_size=self.config.msa_block_size, **common
            )
        output = from_packed(result.out, batch_size)
        if with_kl:
            self.metrics.add("kl", result.kl)
            if self.sample_quality:
                self.sample_quality = False
                self._measure_quality(q, k, index_q, index_k, block_ids, layout)
            output = attach_loss(output, self._objective(result.kl))
        return output

    def _objective(self, kl_rows: Tensor) -> Tensor:
        assert self.config.num_query_groups is not None
        return kl_objective(
            kl_rows,
            coefficient=self.config.msa_loss_coeff,
            num_groups=self.config.num_query_groups,
            per_token=self.config.calculate_per_token_loss,
            context_parallel_size=get_pg_size(self.pg_collection.cp),
        )

    def _touch_index_branch(self, output: Tensor) -> Tensor:
        """Give the idle index branch zero gradients: Megatron's overlapped reduction waits for them all."""
        if not (self.training and torch.is_grad_enabled()):
            return output
        zero = sum((parameter.sum() * 0.0 for parameter in self.index_branch.parameters()), torch.zeros(()))
        return attach_loss(output, zero)

    @torch.no_grad()
    def _measure_quality(
        self, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_ids: Tensor | None, layout: Any
    ) -> None:
        """Compare the selection with the main attention on evenly spaced query rows."""
        num_rows = q.shape[0]
        samples = min(self.config.msa_quality_rows, num_rows)
        # The middle of each of `samples` equal stretches of rows; integer arithmetic, no wait for the device.
        rows = (torch.arange(samples, device=q.device) * 2 + 1) * num_rows // (2 * samples)
        row_layout = layout.select_queries(rows)
        if block_ids is None:
            ids = block_select(
                index_q[rows],
                index_k,
                row_layout,
                block_size=self.config.msa_block_size,
                num_selected_blocks=self.config.msa_num_selected_blocks,
                backend=self.config.msa_backend,
            ).block_ids
        else:
            ids = block_ids[rows]
        quality = selection_quality(
            q[rows],
            k,
            ids,
            row_layout,
            block_size=self.config.msa_block_size,
            index_q=index_q[rows],
            index_k=index_k,
            softmax_scale=self.config.softmax_scale,
        )
        for name in QUALITY_NAMES:
            # Rows that see no more than k blocks select all of them: they would only dilute the figure.
            self.metrics.add_where(name, getattr(quality, name), quality.drops_blocks)
