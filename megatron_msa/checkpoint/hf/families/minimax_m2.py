"""MiniMax-M2: experts in every layer, sigmoid router with a bias for the choice, partial rotary embedding,
and one RMSNorm over all heads of q together and one over all heads of k."""

from typing import Any

from megatron_msa.checkpoint.hf.families.base import Computed, Family, Requires, Same
from megatron_msa.checkpoint.hf.families.common import (
    EXPERT,
    FULL_ATTENTION_ONLY,
    HEAD_DIM,
    LLAMA_LIKE,
    ROPE,
    ROUTER,
    SIZES,
    TIED,
    backbone,
    separate_mlp,
)
from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings
from megatron_msa.errors import ConfigError

_MOE = "model.layers.{layer}.block_sparse_moe"

SIGMOID_ROUTER: Settings = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
}


def _experts_per_token(config: Any) -> Settings:
    if config.num_experts_per_tok < 2:
        raise ConfigError(
            "config.json has num_experts_per_tok = 1: the weight of a single expert is 1 there and the "
            "sigmoid itself in Megatron 0.19.2"
        )
    return {"moe_router_topk": config.num_experts_per_tok}


EXPERTS_PER_TOKEN = Computed(
    _experts_per_token, lambda settings: {"num_experts_per_tok": settings["moe_router_topk"]}
)


def _all_layers(settings: Settings) -> dict[str, Any]:
    if not all(settings["moe_layer_freq"]):
        raise ConfigError(
            f"moe_layer_freq is {settings['moe_layer_freq']}: the family has experts everywhere"
        )
    if settings["ffn_hidden_size"] != settings["moe_ffn_hidden_size"]:
        # No layer uses it, so it can be stated only as what the import writes there.
        return {"intermediate_size": settings["moe_ffn_hidden_size"]}
    return {}


MINIMAX_M2 = Family(
    name="MiniMax-M2",
    architecture="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    rules=(
        *backbone(),
        *separate_mlp(EXPERT, f"{_MOE}.experts.{{expert}}", ("w1", "w3", "w2")),
        Rule(f"{ROUTER}.weight", (f"{_MOE}.gate.weight",)),
        Rule(f"{ROUTER}.expert_bias", (f"{_MOE}.e_score_correction_bias",)),
    ),
    constants=LLAMA_LIKE
    | SIGMOID_ROUTER
    | {
        "qk_layernorm": True,
        "msa_full_width_qk_norm": True,
        "moe_shared_expert_intermediate_size": None,
        "moe_router_topk_scaling_factor": None,
    },
    translations=(
        *SIZES,
        Same("intermediate_size", "moe_ffn_hidden_size"),
        Same("num_local_experts", "num_experts"),
        EXPERTS_PER_TOKEN,
        Computed(
            lambda config: {
                "ffn_hidden_size": config.intermediate_size,
                "moe_layer_freq": [1] * config.num_hidden_layers,
            },
            _all_layers,
        ),
        Requires("scoring_func", ("sigmoid",), "the model code of transformers has this one"),
        Requires("use_routing_bias", (True,), "the model code of transformers has it"),
        Requires("use_qk_norm", (True,), "the model code of transformers has it"),
        Requires("qk_norm_type", ("per_layer",), "the model code of transformers has this one"),
        Requires("shared_intermediate_size", (0,), "the model code of transformers has no shared expert"),
        HEAD_DIM,
        ROPE,
        TIED,
        FULL_ATTENTION_ONLY,
    ),
)
