"""Parameters that one rank of a layout stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_msa.errors import ConfigError
from megatron_msa.planning.layout import Layout
from megatron_msa.training.parameter_count import (
    attention_matrix_size,
    check_countable,
    expert_ffn_size,
    index_head_dim,
    index_matrix_size,
    layer_kinds,
    mlp_matrix_size,
    router_matrix_size,
    shared_expert_matrix_size,
)

if TYPE_CHECKING:
    from megatron_msa.config import MSATransformerConfig


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        vocabulary: rows of the embedding table, padding included.
    """

    config: MSATransformerConfig
    vocabulary: int
    untied: bool


@dataclass(frozen=True)
class RankWeights:
    """Parameters on a rank: those that all data- and context-parallel ranks have, and those of experts."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def check_plannable(config: MSATransformerConfig) -> None:
    """Refuse models of which parameters, FLOPs or memory would be counted wrongly.

    Raises:
        ConfigError: names the setting.
    """
    check_countable(config)
    for name in ("mtp_num_layers", "add_bias_linear", "attention_output_gate", "moe_shared_expert_gate"):
        if getattr(config, name, None):
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}; a plan does not count it"
            )


def rank_weights(model: Model, layout: Layout, pipeline_rank: int) -> RankWeights:
    """Parameters of each rank of a pipeline stage."""
    config, tensor = model.config, layout.tensor
    hidden, d_i = config.hidden_size, index_head_dim(config)
    kinds = layer_kinds(config)
    dense = expert = 0
    for layer in layout.layers_of(pipeline_rank):
        kind = kinds[layer]
        dense += attention_matrix_size(config) // tensor + 2 * hidden
        if config.qk_layernorm:
            dense += 2 * config.kv_channels
        if kind.is_msa:
            key = hidden * d_i  # the index key's projection is replicated
            dense += (index_matrix_size(config) - key) // tensor + key
            dense += 2 * d_i if config.qk_layernorm else 0
        if kind.is_moe:
            dense += router_matrix_size(config) + shared_expert_matrix_size(config) // tensor
            one = mlp_matrix_size(config, expert_ffn_size(config)) // layout.expert_tensor
            expert += config.num_moe_experts // layout.expert * one
        else:
            dense += mlp_matrix_size(config, config.ffn_hidden_size) // tensor
    vocabulary = model.vocabulary * hidden // tensor
    if layout.holds_embedding(pipeline_rank):
        dense += vocabulary
    if layout.holds_output(pipeline_rank):
        dense += hidden  # the final norm
        # A tied table is stored by the first and the last stage, once where they are the same.
        if model.untied or not layout.holds_embedding(pipeline_rank):
            dense += vocabulary
    return RankWeights(dense, expert)
