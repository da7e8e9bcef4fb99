"""MiniMax-M3, the language model: MSA layers, experts with one shared expert, SwiGLU-OAI, Gemma norms.

Two layouts of the same tensors. `MINIMAX_M3_TEXT` is what transformers saves for the language model by
itself (MiniMaxM3VLForCausalLM): experts stacked in one tensor. `MINIMAX_M3` is the released multimodal layout
(MiniMaxM3SparseForConditionalGeneration), one tensor per expert, with the vision part of `minimax_m3_vision`.
"""

from typing import Any

from megatron_msa.checkpoint.hf.families import minimax_m3_vision
from megatron_msa.checkpoint.hf.families.base import Computed, Family, Requires, Same
from megatron_msa.checkpoint.hf.families.common import (
    DENSE_MLP,
    EXPERT,
    HEAD_DIM,
    LLAMA_LIKE,
    ROPE,
    ROUTER,
    SHARED_EXPERT,
    SIZES,
    TIED,
    backbone,
    fused_mlp,
    separate_mlp,
)
from megatron_msa.checkpoint.hf.families.minimax_m2 import EXPERTS_PER_TOKEN, SIGMOID_ROUTER
from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings, pattern_text
from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern

_INDEX = "decoder.layers.{layer}.self_attention.index_branch"
_SPARSE, _FULL = "minimax_m3_sparse", "full_attention"


def _index_rules(template: str) -> tuple[Rule, ...]:
    """``template`` has ``{0}`` for q or k and ``{1}`` for proj or norm, beside ``{layer}``."""

    def name(which: str, what: str) -> tuple[str]:
        return (template.replace("{0}", which).replace("{1}", what),)

    return (
        Rule(f"{_INDEX}.linear_index_q.weight", name("q", "proj")),
        Rule(f"{_INDEX}.linear_index_k.weight", name("k", "proj")),
        Rule(f"{_INDEX}.index_q_layernorm.weight", name("q", "norm"), "gain"),
        Rule(f"{_INDEX}.index_k_norm.weight", name("k", "norm"), "gain"),
    )


def _layers_to_megatron(config: Any) -> Settings:
    unknown = set(config.layer_types) - {_SPARSE, _FULL} | set(config.mlp_layer_types) - {"sparse", "dense"}
    if unknown:
        raise ConfigError(f"config.json has layers of unknown types: {', '.join(sorted(unknown))}")
    return {
        "msa_layer_freq": pattern_text([int(kind == _SPARSE) for kind in config.layer_types]),
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
    }


def _layers_to_hf(settings: Settings) -> dict[str, Any]:
    sparse = parse_layer_pattern(settings["msa_layer_freq"], settings["num_layers"], "--msa-layer-freq")
    return {
        "layer_types": [_SPARSE if is_msa else _FULL for is_msa in sparse],
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in settings["moe_layer_freq"]],
    }


def _index_heads_to_megatron(config: Any) -> Settings:
    if config.index_n_heads != config.num_key_value_heads:
        raise ConfigError(
            f"config.json has index_n_heads {config.index_n_heads} and num_key_value_heads "
            f"{config.num_key_value_heads}; an MSA layer has one index head per GQA group"
        )
    return {}


_GIVEN_BY_OTHERS = Computed(
    _index_heads_to_megatron,
    lambda settings: {
        "index_n_heads": settings["num_query_groups"],
        "index_local_blocks": 1,
        "swiglu_alpha": 1.702,
        "rotary_dim": int(settings["kv_channels"] * settings["rotary_percent"]),
    },
)


def _serving_fields(settings: Settings) -> dict[str, Any]:
    """The released configuration's own notation: serving engines read it, transformers accepts both."""
    sparse = parse_layer_pattern(settings["msa_layer_freq"], settings["num_layers"], "--msa-layer-freq")
    return {
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_num_index_heads": settings["num_query_groups"],
            "sparse_index_dim": settings["msa_indexer_head_dim"],
            "sparse_block_size": settings["msa_block_size"],
            "sparse_topk_blocks": settings["msa_num_selected_blocks"],
            "sparse_local_block": 1,
            "sparse_init_block": 0,
            "sparse_score_type": "max",
            "sparse_attention_freq": sparse,
            "sparse_disable_index_value": sparse,
        },
        "moe_layer_freq": settings["moe_layer_freq"],
    }


def _clamp_to_hf(settings: Settings) -> dict[str, Any]:
    if settings["activation_func_clamp_value"] is None:
        raise ConfigError("activation_func_clamp_value is not set: the family always clamps (swiglu_limit)")
    return {"swiglu_limit": settings["activation_func_clamp_value"]}


_CLAMP = Computed(lambda config: {"activation_func_clamp_value": config.swiglu_limit}, _clamp_to_hf)
_SHARED = {name: value for name, value in LLAMA_LIKE.items() if name != "activation_func_clamp_value"}


def _family(**values: Any) -> Family:
    return Family(
        constants=_SHARED
        | SIGMOID_ROUTER
        | {
            "layernorm_zero_centered_gamma": True,
            "qk_layernorm": True,
            "swiglu": False,
            "quick_geglu": True,
            "glu_linear_offset": 1.0,
            "msa_schedule": "sparse@0",
        },
        translations=(
            *(entry for entry in SIZES if getattr(entry, "hf", None) != "hidden_act"),
            _CLAMP,
            Requires("swiglu_alpha", (1.702,), "Megatron's quick GELU has no other"),
            Same("dense_intermediate_size", "ffn_hidden_size"),
            Same("intermediate_size", "moe_ffn_hidden_size"),
            Same("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
            Same("num_local_experts", "num_experts"),
            EXPERTS_PER_TOKEN,
            Computed(
                lambda config: {"moe_router_topk_scaling_factor": config.routed_scaling_factor},
                lambda settings: {"routed_scaling_factor": settings["moe_router_topk_scaling_factor"] or 1.0},
            ),
            Same("index_head_dim", "msa_indexer_head_dim"),
            Same("index_block_size", "msa_block_size"),
            Same("index_topk_blocks", "msa_num_selected_blocks"),
            Requires("index_local_blocks", (1,), "an MSA layer always takes the query's own block only"),
            Computed(_layers_to_megatron, _layers_to_hf),
            _GIVEN_BY_OTHERS,
            HEAD_DIM,
            ROPE,
            TIED,
        ),
        serving_fields=_serving_fields,
        **values,
    )


_LAYER = "model.layers.{layer}"

MINIMAX_M3_TEXT = _family(
    name="MiniMax-M3 (language model)",
    architecture="MiniMaxM3VLForCausalLM",
    model_type="minimax_m3_vl_text",
    rules=(
        *backbone(),
        *fused_mlp(DENSE_MLP, f"{_LAYER}.mlp"),
        *fused_mlp(SHARED_EXPERT, f"{_LAYER}.mlp.shared_experts"),
        Rule(f"{EXPERT}.linear_fc1.weight", (f"{_LAYER}.mlp.experts.gate_up_proj[{{expert}}]",)),
        Rule(f"{EXPERT}.linear_fc2.weight", (f"{_LAYER}.mlp.experts.down_proj[{{expert}}]",)),
        Rule(f"{ROUTER}.weight", (f"{_LAYER}.mlp.gate.weight",)),
        Rule(f"{ROUTER}.expert_bias", (f"{_LAYER}.mlp.gate.e_score_correction_bias",)),
        *_index_rules(f"{_LAYER}.self_attn.indexer.{{0}}_{{1}}.weight"),
    ),
)

_RELEASED = f"language_model.{_LAYER}"

MINIMAX_M3 = _family(
    name="MiniMax-M3 (released layout)",
    architecture="MiniMaxM3SparseForConditionalGeneration",
    model_type="minimax_m3_vl",
    text_config=True,
    # transformers 5.17 also renames the dense layers' networks when it saves.
    spellings=(
        (r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
        *minimax_m3_vision.SPELLINGS,
    ),
    copied_from_source=minimax_m3_vision.TENSORS,
    vision=Computed(minimax_m3_vision.to_megatron, minimax_m3_vision.to_hf),
    rules=(
        *backbone("language_model."),
        *separate_mlp(DENSE_MLP, f"{_RELEASED}.mlp"),
        *separate_mlp(SHARED_EXPERT, f"{_RELEASED}.block_sparse_moe.shared_experts"),
        *separate_mlp(EXPERT, f"{_RELEASED}.block_sparse_moe.experts.{{expert}}", ("w1", "w3", "w2")),
        Rule(f"{ROUTER}.weight", (f"{_RELEASED}.block_sparse_moe.gate.weight",)),
        Rule(f"{ROUTER}.expert_bias", (f"{_RELEASED}.block_sparse_moe.e_score_correction_bias",)),
        *_index_rules(f"{_RELEASED}.self_attn.index_{{0}}_{{1}}.weight"),
        *minimax_m3_vision.RULES,
    ),
)
