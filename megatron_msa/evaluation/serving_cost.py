"""What serving costs at a context length: FLOPs of a prefill and of a decoded token, and memory of the cache.

The accounting is that of training (`megatron_msa.training.flops`, where the symbols are explained), forward
only:

    prefill of n tokens     2 per weight and token; 4 d H_q per attended pair; 2 d_i H_kv per causal pair
                            for the index scores. The output projection runs for the last token only.
    one decoded token       the same for one query behind n - 1 cached tokens, which sees n

"dense" is the same model with full attention in every layer and no index branch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_msa.config import MSATransformerConfig
from megatron_msa.inference.paged_rows import E4M3, PagedRows
from megatron_msa.training.flops import FORWARD_PRODUCTS, causal_pairs, layer_matrix_size, sparse_pairs
from megatron_msa.training.parameter_count import (
    check_countable,
    index_head_dim,
    index_matrix_size,
    layer_kinds,
)


@dataclass(frozen=True)
class Cost:
    """FLOPs executed, and those of the same work with full attention."""

    executed: float
    dense: float


@dataclass(frozen=True)
class ServingCost:
    """Of one sequence of ``length`` tokens.

    Attributes:
        prefill: FLOPs of reading ``length`` tokens.
        decode: FLOPs of the token that makes ``length``.
        bytes_read_sparse: of the cache for that token: index keys of all tokens, keys and values of the
            chosen blocks, and all keys and values in layers without MSA. Decoding is bound by these bytes.
        bytes_read_dense: keys and values of all tokens.
    """

    length: int
    prefill: Cost
    decode: Cost
    bytes_read_sparse: int
    bytes_read_dense: int


def serving_cost(
    config: MSATransformerConfig,
    *,
    padded_vocab_size: int,
    length: int,
    cache_dtype: torch.dtype = torch.bfloat16,
    index_key_dtype: torch.dtype = torch.bfloat16,
) -> ServingCost:
    """FLOPs and bytes at one length, all layers and heads of the model.

    Args:
        config: of the model.
        padded_vocab_size: rows of the output projection.
        length: tokens, 1 or more.
        cache_dtype: of keys and values; float8_e4m3fn with a scale of 4 bytes per token and head.
        index_key_dtype: of index keys; float8_e4m3fn with a scale of 4 bytes per token.

    Raises:
        ConfigError: the model has parts that are not counted.
    """
    check_countable(config)
    block = config.msa_block_size, config.msa_num_selected_blocks
    causal, sparse = causal_pairs([length]), sparse_pairs([length], *block)
    row = length, sparse - sparse_pairs([length - 1], *block)  # what the last query attends to
    kinds = layer_kinds(config)
    num_msa = sum(kind.is_msa for kind in kinds)
    key_value = 2 * PagedRows.bytes_per_token(config.num_query_groups, config.kv_channels, cache_dtype)
    index_key = PagedRows.bytes_per_token(1, index_head_dim(config), index_key_dtype)
    return ServingCost(
        length=length,
        prefill=_forward(config, padded_vocab_size, length, causal, sparse),
        decode=_forward(config, padded_vocab_size, 1, *row),
        bytes_read_sparse=num_msa * (row[0] * index_key + row[1] * key_value)
        + (len(kinds) - num_msa) * row[0] * key_value,
        bytes_read_dense=len(kinds) * row[0] * key_value,
    )


def cache_bytes_per_token(config: MSATransformerConfig) -> dict[str, dict[str, int]]:
    """Memory of one token over all layers: {"bf16" or "e4m3": {"key_value": bytes, "index_key": bytes}}."""
    num_msa = sum(kind.is_msa for kind in layer_kinds(config))
    return {
        name: {
            "key_value": 2
            * config.num_layers
            * PagedRows.bytes_per_token(config.num_query_groups, config.kv_channels, dtype),
            "index_key": num_msa * PagedRows.bytes_per_token(1, index_head_dim(config), dtype),
        }
        for name, dtype in (("bf16", torch.bfloat16), ("e4m3", E4M3))
    }


def as_json(config: MSATransformerConfig, *, padded_vocab_size: int, length: int) -> dict[str, Any]:
    """Both for a report, with a bf16 cache."""
    cost = serving_cost(config, padded_vocab_size=padded_vocab_size, length=length)
    return {"cost": asdict(cost), "cache_bytes_per_token": cache_bytes_per_token(config)}


def _forward(
    config: MSATransformerConfig, padded_vocab_size: int, tokens: int, causal: int, sparse: int
) -> Cost:
    """FLOPs of a forward pass over ``tokens`` queries that attend to that many pairs."""
    kinds = layer_kinds(config)
    num_msa = sum(kind.is_msa for kind in kinds)
    matrices = 2 * tokens * sum(layer_matrix_size(config, kind) for kind in kinds)
    matrices += 2 * config.hidden_size * padded_vocab_size
    attention = FORWARD_PRODUCTS * 2 * config.kv_channels * config.num_attention_heads  # per pair
    index_scores = 2 * index_head_dim(config) * config.num_query_groups * causal
    index = 2 * tokens * index_matrix_size(config) + index_scores
    dense = matrices + len(kinds) * attention * causal
    executed = matrices + num_msa * (attention * sparse + index) + (len(kinds) - num_msa) * attention * causal
    return Cost(executed=float(executed), dense=float(dense))
