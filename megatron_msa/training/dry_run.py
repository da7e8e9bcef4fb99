"""What `--dry-run` prints: the resolved configuration, the size of the model and the phase schedule."""

from __future__ import annotations

import argparse

from megatron_msa.config import msa_field_names
from megatron_msa.data.multimodal.checks import described_parts
from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size
from megatron_msa.training.parameter_count import count_parameters

_BACKBONE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "qk_layernorm",
    "layernorm_zero_centered_gamma",
    "normalization",
    "activation_func_clamp_value",
    "mtp_num_layers",
    "transformer_impl",
    "params_dtype",
)
_PARALLEL = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "global_batch_size",
    "seq_length",
    "train_iters",
)


def describe(args: argparse.Namespace, model_config: MSAModelConfig) -> str:
    """The whole report as text."""
    config = model_config.transformer
    vocabulary = padded_vocab_size(model_config)
    parameters = count_parameters(
        config,
        padded_vocab_size=vocabulary,
        untied_embeddings=not model_config.share_embeddings_and_output_weights,
        vision=model_config.vision,
    )
    sections = {
        "MSA": {name: getattr(config, name) for name in msa_field_names()},
        "Backbone": {name: getattr(config, name, None) for name in _BACKBONE} | {"vocabulary": vocabulary},
        "Parallel layout and batch": {name: getattr(args, name, None) for name in _PARALLEL},
    }
    if model_config.vision is not None:
        sections["Vision encoder"] = vars(model_config.vision)
    data = MultimodalDataConfig.from_args(args)
    if data is not None:
        sections["Multimodal data"] = {**vars(data), **described_parts(args)}
    lines: list[str] = []
    for title, values in sections.items():
        lines += [title, *(f"  {name:<38} {value}" for name, value in values.items()), ""]
    lines += ["Parameters", *(f"  {line}" for line in parameters.describe().splitlines()), ""]
    lines += ["Phases", *(f"  {line}" for line in config.phase_schedule().describe())]
    return "\n".join(lines)
