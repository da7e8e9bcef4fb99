"""Qwen3-MoE: Qwen3 with routed experts (softmax router, no shared expert) in all or some layers."""

from typing import Any

from megatron_msa.checkpoint.hf.families.base import Computed, Family, Same
from megatron_msa.checkpoint.hf.families.common import (
    DENSE_MLP,
    EXPERT,
    FULL_ATTENTION_ONLY,
    HEAD_DIM,
    LLAMA_LIKE,
    NO_SLIDING_WINDOW,
    ROPE,
    ROUTER,
    SIZES,
    TIED,
    WHOLE_HEAD_ROPE,
    backbone,
    separate_mlp,
)
from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings

_MLP = "model.layers.{layer}.mlp"


def _moe_layers(config: Any) -> Settings:
    """The rule of Qwen3MoeDecoderLayer."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or [])
    return {
        "moe_layer_freq": [
            int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)
        ]
    }


MOE_LAYERS = Computed(
    _moe_layers,
    lambda settings: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(settings["moe_layer_freq"]) if not is_moe],
    },
)

# Softmax over all experts and renormalised over the chosen ones is softmax over the chosen ones.
NORMALISED = Computed(
    lambda config: {"moe_router_pre_softmax": not config.norm_topk_prob},
    lambda settings: {"norm_topk_prob": not settings["moe_router_pre_softmax"]},
)

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=(
        *backbone(),
        *separate_mlp(DENSE_MLP, _MLP),
        *separate_mlp(EXPERT, f"{_MLP}.experts.{{expert}}"),
        Rule(f"{ROUTER}.weight", (f"{_MLP}.gate.weight",)),
    ),
    constants=LLAMA_LIKE
    | {
        "qk_layernorm": True,
        "moe_shared_expert_intermediate_size": None,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_topk_scaling_factor": None,
    },
    translations=(
        *SIZES,
        *NO_SLIDING_WINDOW,
        Same("intermediate_size", "ffn_hidden_size"),
        Same("moe_intermediate_size", "moe_ffn_hidden_size"),
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "moe_router_topk"),
        NORMALISED,
        MOE_LAYERS,
        HEAD_DIM,
        ROPE,
        WHOLE_HEAD_ROPE,
        TIED,
        FULL_ATTENTION_ONLY,
    ),
)
