"""What several families share: table lines of the backbone, and translations of their configuration."""

from __future__ import annotations

from typing import Any

from megatron_msa.checkpoint.hf.families.base import Computed, Requires, Same
from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings, pattern_text
from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern

# What Megatron's scaling of the rotary embedding has built in (`RotaryEmbedding._apply_scaling`).
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def backbone(
    prefix: str = "", *, final_norm: str = "model.norm.weight", qk_norm: bool = True
) -> tuple[Rule, ...]:
    """Embeddings, attention and norms; ``prefix`` is put before every Hugging Face name."""
    layer, attention = "model.layers.{layer}", "model.layers.{layer}.self_attn"
    own, own_attention = "decoder.layers.{layer}", "decoder.layers.{layer}.self_attention"
    rules = [
        ("embedding.word_embeddings.weight", ["model.embed_tokens.weight"], "vocabulary"),
        ("output_layer.weight", ["lm_head.weight"], "vocabulary"),
        ("decoder.final_layernorm.weight", [final_norm], "gain"),
        (f"{own}.input_layernorm.weight", [f"{layer}.input_layernorm.weight"], "gain"),
        (f"{own}.pre_mlp_layernorm.weight", [f"{layer}.post_attention_layernorm.weight"], "gain"),
        (
            f"{own_attention}.linear_qkv.weight",
            [f"{attention}.{name}_proj.weight" for name in "qkv"],
            "qkv",
        ),
        (f"{own_attention}.linear_proj.weight", [f"{attention}.o_proj.weight"], "copy"),
    ]
    if qk_norm:
        rules += [
            (f"{own_attention}.{name}_layernorm.weight", [f"{attention}.{name}_norm.weight"], "gain")
            for name in "qk"
        ]
    return tuple(Rule(own, tuple(prefix + name for name in hf), transform) for own, hf, transform in rules)


def separate_mlp(
    own: str, hf: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """A gated feed-forward network stored as three matrices."""
    gate, up, down = names
    return (
        Rule(f"{own}.linear_fc1.weight", (f"{hf}.{gate}.weight", f"{hf}.{up}.weight"), "rows"),
        Rule(f"{own}.linear_fc2.weight", (f"{hf}.{down}.weight",)),
    )


def fused_mlp(own: str, hf: str) -> tuple[Rule, ...]:
    """A gated feed-forward network stored as Megatron does: gate rows above up rows."""
    return (
        Rule(f"{own}.linear_fc1.weight", (f"{hf}.gate_up_proj.weight",)),
        Rule(f"{own}.linear_fc2.weight", (f"{hf}.down_proj.weight",)),
    )


DENSE_MLP = "decoder.layers.{layer}.mlp"
EXPERT = "decoder.layers.{layer}.mlp.experts.local_experts.{expert}"
SHARED_EXPERT = "decoder.layers.{layer}.mlp.shared_experts"
ROUTER = "decoder.layers.{layer}.mlp.router"
OLD_ROTARY_BUFFER = r".*\.rotary_emb\.inv_freq"

LLAMA_LIKE: Settings = {
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "msa_full_width_qk_norm": False,
    "swiglu": True,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "msa_schedule": "dense@0",
}
"""RMSNorm, SwiGLU, rotary embeddings, no biases, full attention."""

DENSE: Settings = {
    "num_experts": None,
    "moe_shared_expert_intermediate_size": None,
}

SIZES = (
    Same("num_hidden_layers", "num_layers"),
    Same("hidden_size", "hidden_size"),
    Same("num_attention_heads", "num_attention_heads"),
    Same("num_key_value_heads", "num_query_groups"),
    Same("max_position_embeddings", "max_position_embeddings"),
    Same("rms_norm_eps", "layernorm_epsilon"),
    Requires("hidden_act", ("silu",), "the feed-forward networks are SwiGLU"),
    Requires("attention_bias", (False, None), "Megatron biases all linear layers or only those of q, k, v"),
    Requires("mlp_bias", (False, None), "biases are not mapped"),
)

HEAD_DIM = Computed(
    lambda config: {
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    },
    lambda settings: {"head_dim": settings["kv_channels"]},
)

TIED = Computed(
    lambda config: {"untie_embeddings_and_output_weights": not config.tie_word_embeddings},
    lambda settings: {"tie_word_embeddings": not settings["untie_embeddings_and_output_weights"]},
)


def _rope_to_megatron(config: Any) -> Settings:
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    percent = rope.get("partial_rotary_factor")
    rotary_dim = getattr(config, "rotary_dim", None)
    if percent is None:
        # The released MiniMax-M2 has only this field.
        percent = 1.0 if rotary_dim is None else rotary_dim / head_dim
    elif rotary_dim is not None and int(head_dim * percent) != rotary_dim:
        raise ConfigError(
            f"config.json contradicts itself: rotary_dim is {rotary_dim}, partial_rotary_factor {percent} of "
            f"head_dim {head_dim} is {int(head_dim * percent)}; correct one of them"
        )
    base = rope["rope_theta"]
    settings: Settings = {"rotary_percent": float(percent), "rotary_base": int(base)}
    if int(base) != base:
        raise ConfigError(f"config.json has rope_theta {base}; Megatron's --rotary-base takes integers")
    kind = rope.get("rope_type", "default")
    if kind == "linear" and float(rope["factor"]).is_integer():
        settings["rotary_seq_len_interpolation_factor"] = int(rope["factor"])
    elif kind == "llama3" and all(rope.get(name) == value for name, value in _LLAMA3_SCALING.items()):
        settings |= {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    elif kind != "default":
        raise ConfigError(
            f"config.json scales the rotary embedding with {rope}; Megatron 0.19.2 has the types default, "
            f"linear with an integer factor, and llama3 with {_LLAMA3_SCALING}"
        )
    return settings


def _rope_to_hf(settings: Settings) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(settings["rotary_base"])}
    if settings["rotary_percent"] != 1.0:
        rope["partial_rotary_factor"] = settings["rotary_percent"]
    if settings["rotary_seq_len_interpolation_factor"] is not None:
        rope |= {"rope_type": "linear", "factor": float(settings["rotary_seq_len_interpolation_factor"])}
    if settings["use_rope_scaling"]:
        if rope["rope_type"] == "linear":
            raise ConfigError("the rotary embedding is scaled twice: linearly and as in Llama 3")
        rope |= {"rope_type": "llama3", "factor": settings["rope_scaling_factor"], **_LLAMA3_SCALING}
    return {"rope_parameters": rope}


ROPE = Computed(_rope_to_megatron, _rope_to_hf)


def _no_msa_to_megatron(config: Any) -> Settings:
    return {"msa_layer_freq": pattern_text([0] * config.num_hidden_layers)}


def _no_msa_to_hf(settings: Settings) -> dict[str, Any]:
    if any(parse_layer_pattern(settings["msa_layer_freq"], settings["num_layers"], "--msa-layer-freq")):
        raise ConfigError(
            f"msa_layer_freq is {settings['msa_layer_freq']}: the family has full attention only"
        )
    return {}


FULL_ATTENTION_ONLY = Computed(_no_msa_to_megatron, _no_msa_to_hf)


def no_partial_rotary(settings: Settings) -> dict[str, Any]:
    """For families whose transformers code turns whole heads."""
    if settings["rotary_percent"] != 1.0:
        raise ConfigError(f"rotary_percent is {settings['rotary_percent']}, the family turns whole heads")
    return {}


WHOLE_HEAD_ROPE = Computed(lambda config: {}, no_partial_rotary)
NO_SLIDING_WINDOW = (
    Requires("use_sliding_window", (False, None), "layers with a sliding window cannot be expressed"),
)
