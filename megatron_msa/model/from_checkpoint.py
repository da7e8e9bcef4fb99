"""The model of a checkpoint, from the arguments that training saved in it."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments

from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig

# How a run spreads and computes the model, not what the model is; as on one process without extra libraries.
_ON_ONE_PROCESS: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "cuda_graph_impl": "none",
    "recompute_granularity": None,
    "fp8": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def model_config_from_checkpoint(args: argparse.Namespace, **settings: Any) -> MSAModelConfig:
    """The model that a checkpoint holds, for one process without Transformer Engine.

    Args:
        args: what the checkpoint has as its arguments, all of Megatron's or some; Megatron's defaults serve
            for the others.
        settings: arguments by name that replace those, for example the msa settings.

    Raises:
        ConfigError: arguments that no model can be made of.
    """
    complete = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([])
    complete.params_dtype = torch.float32
    complete.padded_vocab_size = None
    for values in (vars(copy.copy(args)), _ON_ONE_PROCESS, settings):
        vars(complete).update(values)
    try:
        transformer = core_transformer_config_from_args(complete, MSATransformerConfig)
        return MSAModelConfig.from_args(complete, transformer)
    except (AssertionError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"no model can be made of the checkpoint's arguments: {' '.join(str(error).split())}"
        ) from error
