"""The flags that a conversion prints build the model that it converted, through the real parser."""

import argparse
import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hf_models import MODELS

from megatron_msa.checkpoint.hf.families import FAMILIES, by_config, known  # isort: skip
from megatron_msa.checkpoint.hf.settings import (
    complete,
    from_arguments,
    pattern_text,
    to_arguments,
    to_bash_array,
    to_flags,
    to_model_config,
)
from megatron_msa.errors import ConfigError
from megatron_msa.training import arguments, megatron_fixes

# What training settings change in the configuration, but not in the function that the model computes.
TRAINING_ONLY = {
    "deallocate_pipeline_outputs",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "bias_dropout_fusion",
    "persist_layer_norm",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "inference_sampling_seed",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "cp_comm_type",
    "config_logger_dir",
    "async_tensor_model_parallel_allreduce",
    "moe_aux_loss_coeff",
    "add_qkv_bias",  # without effect when there are no biases
    "use_cpu_initialization",
    "attention_softmax_in_fp32",  # nothing else is used by the attention of this package
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
}


def settings_of(name: str) -> dict[str, Any]:
    config = MODELS[name]().config
    family = by_config({"architectures": [type_name(name)]}, name)
    return family.to_settings(config, 128)


def type_name(name: str) -> str:
    return {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "minimax_m2": "MiniMaxM2ForCausalLM",
        "minimax_m3_text": "MiniMaxM3VLForCausalLM",
        "minimax_m3": "MiniMaxM3SparseForConditionalGeneration",
    }[name]


def parsed_by_bash(array: str) -> list[str]:
    """The words of the array ``MODEL`` as a script sees them."""
    script = array + '\nprintf "%s\\0" "${MODEL[@]}"'
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return output.split("\0")[:-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_flags_build_the_converted_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron_fixes.apply()
    settings = settings_of(name)
    flags = parsed_by_bash(to_bash_array(to_flags(settings)))
    others = "--seq-length 128 --micro-batch-size 1 --train-iters 1 --skip-train --transformer-impl local"
    others += " --tokenizer-type NullTokenizer --vocab-size 89 --msa-backend auto"
    monkeypatch.setattr(sys, "argv", ["pretrain_msa.py", *flags, *others.split()])
    args = arguments.parse_arguments(has_gpu=False)
    actual = arguments.model_config_from_args(args)
    expected = to_model_config(settings)
    differing = {
        field.name
        for field in dataclasses.fields(expected.transformer)
        if not same(getattr(actual.transformer, field.name), getattr(expected.transformer, field.name))
    }
    assert differing <= TRAINING_ONLY
    for field in dataclasses.fields(expected):
        if field.name not in ("transformer", "make_vocab_size_divisible_by"):
            assert getattr(actual, field.name) == getattr(expected, field.name), field.name
    assert from_arguments(args) == settings, "what training would save is read as the same model"


def same(actual: Any, expected: Any) -> bool:
    """Initial distributions are functions made anew each time: as far as a conversion goes, all are equal."""
    if callable(actual) and callable(expected):
        makes = (actual, expected)
        if all(isinstance(each, partial) or "init" in getattr(each, "__name__", "init") for each in makes):
            return True
    return actual == expected


def test_saved_arguments_give_the_settings_back() -> None:
    for name in MODELS:
        settings = settings_of(name)
        assert from_arguments(to_arguments(settings)) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mtp_num_layers", 1),
        ("attention_output_gate", True),
        ("rotary_interleaved", True),
        ("window_size", (4, 0)),
    ],
)
def test_what_no_family_has_is_refused(name: str, value: Any) -> None:
    args = to_arguments(settings_of("llama"))
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"trained with {name} = "):
        from_arguments(args)


def test_multi_head_attention_is_grouped_attention_with_a_group_per_head() -> None:
    settings = settings_of("llama")
    args = to_arguments(settings | {"group_query_attention": False, "num_query_groups": None})
    assert from_arguments(args)["num_query_groups"] == settings["num_attention_heads"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [([1], "([1]*1)"), ([0, 0, 1, 1, 1, 0], "([0]*2+[1]*3+[0]*1)")],
)
def test_layer_patterns_are_written_short(pattern: list[int], text: str) -> None:
    assert pattern_text(pattern) == text


def _config(name: str, **changes: Any) -> Any:
    config = MODELS[name]().config
    config = getattr(config, "text_config", config)
    for field, value in changes.items():
        setattr(config, field, value)
    return config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True; only False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "takes integers"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("minimax_m2", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("minimax_m3_text", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        ("minimax_m3_text", {"index_n_heads": 1}, "one index head per GQA group"),
        ("minimax_m3_text", {"index_local_blocks": 2}, "index_local_blocks = 2"),
        ("minimax_m3_text", {"rotary_dim": 8}, "contradicts itself: rotary_dim is 8"),
    ],
)
def test_what_megatron_cannot_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    family = by_config({"architectures": [type_name(name)]}, name)
    with pytest.raises(ConfigError, match=message):
        family.to_settings(_config(name, **changes), 128)


def test_the_released_minimax_m2_gives_its_rotary_dimensions_in_another_field() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6}
    config = _config("minimax_m2", rope_parameters=rope, rotary_dim=4)
    (family,) = (each for each in FAMILIES if each.model_type == "minimax_m2")
    assert family.to_settings(config, 128)["rotary_percent"] == 0.5


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_embeddings_come_back(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 5e5, "factor": 32.0}
    if kind == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rope |= scaling
    config = _config("llama", rope_parameters=rope)
    (family,) = (each for each in FAMILIES if each.model_type == "llama")
    assert family.hf_fields(family.to_settings(config, 128))["rope_parameters"] == rope


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="GPT2LMHeadModel, which cannot be converted; known are Llama"
    ) as raised:
        by_config({"architectures": ["GPT2LMHeadModel"]}, "config.json")
    assert known() in str(raised.value)
    with pytest.raises(ConfigError, match="model_type 'gpt2'"):
        by_config({"model_type": "gpt2"}, "config.json")
    assert by_config({"model_type": "qwen3"}, "config.json").name == "Qwen3"


def test_settings_are_known_ones() -> None:
    with pytest.raises(AssertionError, match="nonsense"):
        complete({"nonsense": 1})
    assert isinstance(to_arguments(complete({})), argparse.Namespace)
