"""The model's settings in Megatron's terms: as flags, as saved arguments, and as a model configuration.

A settings dict has the names that Megatron's parser gives its arguments ("dest"). It holds what the model
computes, nothing about how it is trained or spread over devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern
from megatron_msa.model.gpt import MSAModelConfig
from megatron_msa.model.vision.config import VisionConfig

Settings = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One argument of Megatron.

    Attributes:
        name: its dest in the parser.
        flag: how it is written. A boolean is a flag without a value, written when it is True (or False for
            ``--disable-...``).
        default: Megatron's; equal values are not written.
        field: the name of the field in the TransformerConfig, where it is another; None if it has none there.
    """

    name: str
    flag: str
    default: Any = None
    field: str | None = ""

    @property
    def config_field(self) -> str | None:
        return self.name if self.field == "" else self.field


_VISION_SETTINGS = tuple(
    Setting(field.name, f"--{field.name.replace('_', '-')}", field.default, None)
    for field in dataclasses.fields(VisionConfig)
    if field.name != "vision_load"
)
NO_VISION: Settings = {setting.name: setting.default for setting in _VISION_SETTINGS}
"""The settings of a text model."""

SETTINGS = (
    Setting("num_layers", "--num-layers"),
    Setting("hidden_size", "--hidden-size"),
    Setting("ffn_hidden_size", "--ffn-hidden-size"),
    Setting("num_attention_heads", "--num-attention-heads"),
    Setting("group_query_attention", "--group-query-attention", False, None),
    Setting("num_query_groups", "--num-query-groups"),
    Setting("kv_channels", "--kv-channels"),
    Setting("max_position_embeddings", "--max-position-embeddings", None, None),
    Setting("position_embedding_type", "--position-embedding-type", "learned_absolute", None),
    Setting("rotary_percent", "--rotary-percent", 1.0, None),
    Setting("rotary_base", "--rotary-base", 10000, None),
    Setting("rotary_seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor", None, None),
    Setting("use_rope_scaling", "--use-rope-scaling", False, None),
    Setting("rope_scaling_factor", "--rope-scaling-factor", 8.0, None),
    Setting("normalization", "--normalization", "LayerNorm"),
    Setting("layernorm_epsilon", "--norm-epsilon", 1e-5),
    Setting("layernorm_zero_centered_gamma", "--apply-layernorm-1p", False),
    Setting("qk_layernorm", "--qk-layernorm", False),
    Setting("msa_full_width_qk_norm", "--msa-full-width-qk-norm", False),
    Setting("swiglu", "--swiglu", False, None),
    Setting("quick_geglu", "--quick-geglu", False, None),
    Setting("glu_linear_offset", "--glu-linear-offset", 0.0),
    Setting("activation_func_clamp_value", "--activation-func-clamp-value"),
    Setting("add_bias_linear", "--disable-bias-linear", True),
    Setting("untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights", False, None),
    Setting("attention_dropout", "--attention-dropout", 0.1),
    Setting("hidden_dropout", "--hidden-dropout", 0.1),
    Setting("num_experts", "--num-experts", None, "num_moe_experts"),
    Setting("moe_layer_freq", "--moe-layer-freq", 1),
    Setting("moe_ffn_hidden_size", "--moe-ffn-hidden-size"),
    Setting("moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size"),
    Setting("moe_router_topk", "--moe-router-topk", 2),
    Setting("moe_router_score_function", "--moe-router-score-function", "softmax"),
    Setting("moe_router_pre_softmax", "--moe-router-pre-softmax", False),
    Setting("moe_router_enable_expert_bias", "--moe-router-enable-expert-bias", False),
    Setting("moe_router_topk_scaling_factor", "--moe-router-topk-scaling-factor"),
    Setting("msa_layer_freq", "--msa-layer-freq", "1"),
    Setting("msa_block_size", "--msa-block-size", 128),
    Setting("msa_num_selected_blocks", "--msa-num-selected-blocks", 16),
    Setting("msa_indexer_head_dim", "--msa-indexer-head-dim"),
    Setting("msa_schedule", "--msa-schedule"),
    Setting("padded_vocab_size", "--padded-vocab-size", None, None),
    *_VISION_SETTINGS,
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}

# Arguments that change what the model computes and that no Hugging Face family here knows: value that is
# equivalent to their absence. Compared only where a checkpoint's arguments have them.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "add_qkv_bias": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "no_rope_freq": (None,),
    "rotary_interleaved": (False,),
    "rotary_scaling_factor": (1.0,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "use_mup": (False,),
    "mtp_num_layers": (None, 0),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_shared_expert_gate": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "experimental_attention_variant": (None,),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
}


def complete(values: Mapping[str, Any]) -> Settings:
    """``values`` with Megatron's defaults for everything else, in the order of `SETTINGS`."""
    unknown = values.keys() - _BY_NAME.keys()
    assert not unknown, f"not settings of a model: {unknown}"
    return {setting.name: values.get(setting.name, setting.default) for setting in SETTINGS}


def from_arguments(args: argparse.Namespace) -> Settings:
    """The settings of a checkpoint saved by training (or by a conversion), in one notation.

    Raises:
        ConfigError: the arguments describe a model that no family here can hold.
    """
    for name, allowed in _MUST_BE.items():
        if getattr(args, name, allowed[0]) not in allowed:
            raise ConfigError(
                f"the checkpoint was trained with {name} = {getattr(args, name)!r}, which no Hugging Face "
                f"family here has (only {' or '.join(map(repr, allowed))})"
            )
    values = {name: getattr(args, name) for name in _BY_NAME if hasattr(args, name)}
    settings = complete(values)
    layers = settings["num_layers"]
    if not settings["group_query_attention"]:
        settings |= {"group_query_attention": True, "num_query_groups": settings["num_attention_heads"]}
    if settings["num_experts"]:
        settings["moe_layer_freq"] = parse_layer_pattern(
            settings["moe_layer_freq"], layers, "--moe-layer-freq"
        )
    pattern = parse_layer_pattern(settings["msa_layer_freq"], layers, "--msa-layer-freq")
    settings["msa_layer_freq"] = pattern_text(pattern)
    if not any(pattern):
        settings["msa_indexer_head_dim"] = None
    elif settings["msa_indexer_head_dim"] is None:
        settings["msa_indexer_head_dim"] = settings["kv_channels"]
    if settings["vision_mode"] == "none":
        settings |= NO_VISION
    else:
        settings["vision_mode"] = "train"  # whether it was frozen is nothing that the model computes
        settings["vision_projector_hidden_size"] = (
            settings["vision_projector_hidden_size"] or settings["hidden_size"]
        )
    return settings


def to_arguments(settings: Settings) -> argparse.Namespace:
    """What a checkpoint stores as its arguments, so that Megatron's --use-checkpoint-args finds them.

    Megatron writes the type of the training run's arguments; of the others it only asks for these.
    """
    layout = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
    }
    other = {
        "add_position_embedding": True,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**settings, **layout, **other)


def to_flags(settings: Settings) -> list[list[str]]:
    """Flags with their values, those that equal Megatron's defaults left out."""
    flags = []
    for setting in SETTINGS:
        value = settings[setting.name]
        if value == setting.default or value is None:
            continue
        if isinstance(value, bool):
            flags.append([setting.flag])
        elif isinstance(value, list):
            flags.append([setting.flag, pattern_text(value)])
        else:
            flags.append([setting.flag, _number_text(value)])
    return flags


def to_bash_array(flags: list[list[str]], name: str = "MODEL") -> str:
    """``NAME=( --flag value ... )``, one flag a line, quoted for bash."""
    lines = [f"    {' '.join([flag[0], *map(shlex.quote, flag[1:])])}" for flag in flags]
    return "\n".join([f"{name}=(", *lines, ")"]) + "\n"


def to_model_config(
    settings: Settings, *, dtype: torch.dtype = torch.float32, **transformer_changes: Any
) -> MSAModelConfig:
    """The model as `pretrain_msa.py` builds it from these settings, for one process and without training.

    Args:
        settings: complete settings.
        dtype: of the parameters.
        transformer_changes: fields of the MSATransformerConfig.

    Raises:
        ConfigError: settings that no model can be made of.
    """
    fields: dict[str, Any] = {
        setting.config_field: settings[setting.name]
        for setting in SETTINGS
        if setting.config_field is not None
    }
    gated = settings["swiglu"] or settings["quick_geglu"]
    fields |= {
        "gated_linear_unit": gated,
        "bias_activation_fusion": False,
        "transformer_impl": "local",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    if settings["swiglu"]:
        fields["activation_func"] = torch.nn.functional.silu
    elif settings["quick_geglu"]:
        fields["activation_func"] = quick_gelu
    try:
        return MSAModelConfig(
            transformer=MSATransformerConfig(**fields | transformer_changes),
            vocab_size=settings["padded_vocab_size"],
            should_pad_vocab=False,
            seq_length=settings["max_position_embeddings"],
            position_embedding_type=settings["position_embedding_type"],
            rotary_percent=settings["rotary_percent"],
            rotary_base=settings["rotary_base"],
            rope_scaling=settings["use_rope_scaling"],
            rope_scaling_factor=settings["rope_scaling_factor"],
            seq_len_interpolation_factor=settings["rotary_seq_len_interpolation_factor"],
            share_embeddings_and_output_weights=not settings["untie_embeddings_and_output_weights"],
            vision=VisionConfig.from_args(argparse.Namespace(**settings)),
        )
    except (AssertionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"Megatron refuses this model: {' '.join(str(error).split())}") from error


def pattern_text(pattern: list[int]) -> str:
    """A layer pattern as the flags take it: ``[0]*3+[1]*57`` in brackets."""
    runs: list[list[int]] = []
    for entry in pattern:
        if runs and runs[-1][0] == entry:
            runs[-1][1] += 1
        else:
            runs.append([entry, 1])
    return f"({'+'.join(f'[{entry}]*{count}' for entry, count in runs)})"


def _number_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return f"{value:.1f}"
    return str(value)
