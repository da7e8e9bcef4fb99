"""`MSASelfAttention`: Megatron's self attention with an index branch, block selection and the KL loss.

    hidden states -> q, k, v                      (Megatron: QKV projection, q/k norm, RoPE)
    sg(hidden states) -> index_q, index_k         (index branch, same norm and RoPE)
    index_q, index_k -> block ids                 (sparse phase)
    q, k, v, block ids -> output, KL              (KL attached to the output for the backward pass)
    output -> output projection

What runs is decided by `phase`, which the training loop sets (see `megatron_msa.phases`). Under context
parallelism the queries are this rank's, the keys of all ranks are gathered (see `key_exchange`), and what is
selected and lost is what a single rank would select and lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.utils import get_pg_size
from msa_kernels import DocumentLayout, block_select, dense_kl, selection_quality, sparse_attention
from torch import Tensor

from megatron_msa.attention import selection_replay
from megatron_msa.attention.context_parallel import TokenLayout
from megatron_msa.attention.full_attention import FullSelfAttention
from megatron_msa.attention.index_branch import IndexBranch, IndexBranchSubmodules
from megatron_msa.attention.key_exchange import KeyExchange, kept_as_shards
from megatron_msa.attention.kl_loss import attach_loss, kl_objective, set_loss_scale
from megatron_msa.attention.layer_metrics import QUALITY_NAMES, LayerMetrics
from megatron_msa.attention.packing import document_layout, from_packed, to_packed
from megatron_msa.config import MSATransformerConfig
from megatron_msa.phases import Phase

_INDEX_KEY = 0
"""Its number among the tensors that are exchanged; it is needed first."""


@dataclass
class MSASelfAttentionSubmodules(SelfAttentionSubmodules):
    """Megatron's self-attention submodules and those of the index branch."""

    index_branch: IndexBranchSubmodules | None = None


class MSASelfAttention(FullSelfAttention):
    """Self attention of one MSA layer; input and output [s, b, hidden] as in Megatron."""

    def __init__(
        self, config: MSATransformerConfig, submodules: MSASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        assert submodules.index_branch is not None, "the layer spec must name the index branch's submodules"
        self.index_branch = IndexBranch(config, submodules.index_branch, self.pg_collection)
        # Here, not where the model is built: without it the schedules would leave the KL unscaled, silently.
        config.experimental_attention_variant_loss_scale_func = set_loss_scale
        if config.recompute_granularity == "full":
            selection_replay.install()
        self.phase = config.phase_schedule().phases[0]
        self.metrics = LayerMetrics()
        self.sample_quality = False
        """Measure the selection in the next forward pass that computes the KL loss or trains nothing, then
        turn itself off."""
        self.index_key_as_kept: Callable[[Tensor], Tensor] | None = None
        """What a cache makes of rotated index keys, where a selection is measured for one."""

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
        """See `FullSelfAttention._attention`."""
        if not self.phase.has_kl:
            output, exchange = super()._attention(
                hidden_states, query, key, value, tables, packed_seq_params, tokens
            )
            return self._run_idle_index_branch(hidden_states, output), exchange
        layout = document_layout(query, packed_seq_params, tokens)
        batch_size = None if query.dim() == 3 else query.shape[1]
        index_query, index_key = self.index_branch(hidden_states)
        if batch_size is None:
            index_query, index_key = index_query.squeeze(1), index_key.squeeze(1)

        # Under context parallelism the index keys are on their way while the queries are rotated, keys and
        # values while the blocks are selected.
        index_key = to_packed(self._rotate(index_key, tables[1]))
        if self.index_key_as_kept is not None:
            index_key = self.index_key_as_kept(index_key)
        key, value = to_packed(self._rotate(key, tables[1])), to_packed(value)
        exchange = None
        if tokens is not None:
            exchange = KeyExchange(tokens, self.pg_collection.cp)
            index_key, key, value = exchange.send(index_key, key, value)
            exchange.start(_INDEX_KEY)
        query = to_packed(self._rotate(query, tables[0]))
        index_query = to_packed(self._rotate(index_query, tables[0]))
        if exchange is not None:
            exchange.start()

        extra = {"layout": layout, "index_query": index_query, "index_key": index_key, "exchange": exchange}
        if self.phase is Phase.SPARSE:
            # Outside the recomputed region: selective recomputation replays the saved selection.
            extra |= self._select(index_query, index_key, layout, exchange)
        output = self._core_attention(query, key, value, packed_seq_params, extra)
        return from_packed(output, batch_size), exchange

    def _select(
        self, index_query: Tensor, index_key: Tensor, layout: DocumentLayout, exchange: KeyExchange | None
    ) -> dict[str, Tensor]:
        selection = selection_replay.selected_once(
            lambda: block_select(
                index_query,
                index_key if exchange is None else exchange.peek(_INDEX_KEY),
                layout,
                block_size=self.config.msa_block_size,
                num_selected_blocks=self.config.msa_num_selected_blocks,
                with_lse=False,
                backend=self.config.msa_backend,
            )
        )
        return {"block_ids": selection.block_ids}

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        layout: DocumentLayout | None = None,
        index_query: Tensor | None = None,
        index_key: Tensor | None = None,
        exchange: KeyExchange | None = None,
        block_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Megatron's hook: also what `_checkpointed_attention_forward` recomputes.

        Without ``layout`` the phase has no KL, and tensors and arguments are Megatron's. With it all tensors
        are packed, [t, h, d], the keys are this rank's, and the output is [t, h, d].
        """
        if layout is None:
            return super()._run_core_attention(query, key, value, *args, **kwargs)
        assert index_query is not None
        assert index_key is not None
        if exchange is not None:
            index_key, key, value = exchange.receive(index_key, key, value)
        # In the first, gradient-free pass of activation recomputation and in evaluation there is nothing to
        # train and nothing to count; the pass that records gradients does both exactly once.
        with_kl = self.training and torch.is_grad_enabled()
        kl_inputs = {"index_q": index_query, "index_k": index_key} if with_kl else {}
        common = {"softmax_scale": self.config.softmax_scale, "backend": self.config.msa_backend, **kl_inputs}
        # A recomputed core attention is followed by its backward pass at once.
        with kept_as_shards(None if self.checkpoint_core_attention else exchange):
            if block_ids is None:
                result = dense_kl(query, key, value, layout, **common)
            else:
                block_size = self.config.msa_block_size
                result = sparse_attention(
                    query, key, value, block_ids, layout, block_size=block_size, **common
                )
        output = result.out
        if self.sample_quality and (with_kl or not self.training):
            self.sample_quality = False
            self._measure_quality(query, key, index_query, index_key, block_ids, layout)
        if with_kl:
            self.metrics.add("kl", result.kl)
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

    def _run_idle_index_branch(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """``output`` unchanged; in training the index branch has run on a token, and gets zero gradients.

        Megatron's overlapped reduction waits for the gradients of all parameters, and its overlapped
        gathering for the forward pass of all modules.
        """
        if not (self.training and torch.is_grad_enabled()):
            return output
        index_query, index_key = self.index_branch(hidden_states[:1])
        return attach_loss(output, (index_query.float().sum() + index_key.float().sum()) * 0.0)

    @torch.no_grad()
    def _measure_quality(
        self,
        q: Tensor,
        k: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        block_ids: Tensor | None,
        layout: DocumentLayout,
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
                with_lse=False,
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
