"""The index branch: one index query head per GQA group and one index key head shared by all groups.

    index_q = norm(sg(x) W_qi)    [s, b, groups, d_i]
    index_k = norm(sg(x) W_ki)    [s, b, 1, d_i]

``sg`` is the stop-gradient on the hidden states: the branch never trains the backbone. Norms and rotary
embeddings mirror those of the main branch (arXiv 2606.13392; the released model does the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size
from torch import Tensor, nn

from megatron_msa.config import MSATransformerConfig


@dataclass
class IndexBranchSubmodules:
    """Builders: a column-parallel linear layer, and the norm of the main branch's q and k (None: no norm)."""

    linear_index_q: Any
    index_norm: Any | None = None


class ReplicatedLinear(nn.Module):
    """A bias-free linear layer whose weight every tensor-parallel rank holds whole.

    Megatron has none outside Transformer Engine. The caller makes the weight's gradient complete (see
    `IndexBranch.forward`); ``sequence_parallel`` on the weight lets Megatron sum it over ranks that saw
    different rows.
    """

    def __init__(self, input_size: int, output_size: int, config: MSATransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class IndexBranch(MegatronModule):
    """Projects hidden states to index queries (sharded like the GQA groups) and index keys (replicated).

    Parameters are named so that Megatron's gradient finalisation treats them right under tensor parallelism:
    ``index_q_layernorm`` matches its rule for q/k norms (each rank sees only its heads: sum over TP), while
    ``index_k_norm`` must not match it (its gradient is already complete without sequence parallelism).
    """

    def __init__(
        self,
        config: MSATransformerConfig,
        submodules: IndexBranchSubmodules,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert config.msa_indexer_head_dim is not None
        assert config.num_query_groups is not None
        self.head_dim = config.msa_indexer_head_dim
        self.tp_group = pg_collection.tp
        self.linear_index_q = submodules.linear_index_q(
            config.hidden_size,
            config.num_query_groups * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
        )
        self.linear_index_k = ReplicatedLinear(config.hidden_size, self.head_dim, config)
        self.index_q_layernorm = self._norm(submodules.index_norm)
        self.index_k_norm = self._norm(submodules.index_norm)
        for parameter in self.parameters():
            parameter.is_msa_index_parameter = True  # type: ignore[attr-defined]

    def _norm(self, builder: Any | None) -> nn.Module | None:
        if builder is None:
            return None
        return builder(hidden_size=self.head_dim, config=self.config, eps=self.config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries and keys before the rotary embedding.

        Args:
            hidden_states: [s, b, hidden], normalised; with sequence parallelism [s / TP, b, hidden].

        Returns:
            index_q [s, b, groups / TP, d_i] and index_k [s, b, 1, d_i], over the whole sequence.
        """
        hidden_states = hidden_states.detach()
        index_q, _ = self.linear_index_q(hidden_states)
        index_q = index_q.view(*index_q.shape[:2], -1, self.head_dim)
        index_k = self.linear_index_k(hidden_states).unsqueeze(2)
        if self.index_q_layernorm is not None:
            index_q = self.index_q_layernorm(index_q)
        if self.index_k_norm is not None:
            index_k = self.index_k_norm(index_k)
        if get_pg_size(self.tp_group) > 1:
            # Each rank's groups contribute to d(index_k); both backward passes sum them over TP.
            if self.config.sequence_parallel:
                index_k = gather_from_sequence_parallel_region(
                    index_k, tensor_parallel_output_grad=True, group=self.tp_group
                )
            else:
                index_k = copy_to_tensor_model_parallel_region(index_k, group=self.tp_group)
        return index_q, index_k
