"""Settings that cannot work are refused with the flag, the value and what to do."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_msa.config import MSATransformerConfig, msa_field_names
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size
from megatron_msa.phases import Phase
from tests.attention.tiny import tiny_config

MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"msa_num_selected_blocks": 0}, "--msa-num-selected-blocks is 0; at least 1 is needed"),
    ({"msa_block_size": 0}, "--msa-block-size is 0; it must be positive"),
    ({"msa_indexer_head_dim": 0}, "--msa-indexer-head-dim is 0; it must be positive"),
    ({"msa_loss_coeff": -0.5}, "--msa-loss-coeff is -0.5; it must not be negative"),
    ({"msa_indexer_lr": -1e-4}, "--msa-indexer-lr is -0.0001; it must not be negative"),
    ({"msa_backend": "cuda"}, "--msa-backend is 'cuda'; allowed: auto, triton, reference"),
    ({"msa_quality_interval": -1}, "the interval must be 0 (never) or more"),
    (
        {"msa_quality_rows": 0},
        "--msa-quality-rows 0: the interval must be 0 (never) or more, the rows at least 1",
    ),
    (
        {"num_query_groups": 3},
        "--num-attention-heads 4 is not divisible by --num-query-groups 3; every GQA group needs",
    ),
    ({"num_query_groups": 0}, "--num-attention-heads 4 is not divisible by --num-query-groups 0"),
    (
        {"tensor_model_parallel_size": 4},
        "--tensor-model-parallel-size is 4 but there are 2 GQA groups (--num-query-groups)",
    ),
    ({"transformer_impl": "inference_optimized"}, "--transformer-impl is inference_optimized; MSA layers"),
    ({"attention_dropout": 0.1}, "--attention-dropout is 0.1; MSA layers support only 0.0"),
    ({"multi_latent_attention": True}, "--multi-latent-attention is True; MSA layers support only False"),
    ({"window_size": (128, 0)}, "--window-size is (128, 0); MSA layers support only None"),
    ({"softmax_type": "learnable"}, "--softmax-type is learnable; MSA layers support only vanilla"),
    ({"msa_cp_layout": "ring"}, "--msa-cp-layout is 'ring'; allowed: auto, zigzag, balanced, documents"),
    ({"qk_clip": True}, "--qk-clip is True; MSA layers support only False"),
    ({"log_max_attention_logit": True}, "--log-max-attention-logit is True; MSA layers support only False"),
    ({"cuda_graph_impl": "local"}, "--cuda-graph-impl is local; MSA layers support only none"),
    (
        {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
        "--apply-layernorm-1p needs --normalization RMSNorm with --transformer-impl local, got LayerNorm",
    ),
    (
        {"normalization": "LayerNorm", "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "--sequence-parallel needs --normalization RMSNorm with --transformer-impl local, got LayerNorm",
    ),
    ({"msa_schedule": None}, "--msa-schedule is missing"),
    ({"msa_layer_freq": "[1]"}, "--msa-layer-freq describes 1 layers, the model has 2 (--num-layers)"),
]


@pytest.mark.parametrize(("settings", "message"), MESSAGES, ids=lambda value: str(value)[:60])
def test_an_unusable_setting_is_named_with_its_value(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rotary_percent": 1.0},
            "--msa-indexer-head-dim is 6 but the rotary embedding turns 8 dimensions of each head "
            "(--kv-channels 8 times --rotary-percent 1.0); use at least 8",
        ),
        ({"rotary_percent": 0.5, "position_embedding_type": "mrope"}, "--position-embedding-type is mrope"),
        ({"rotary_percent": 0.5, "transformer_layer_spec": object()}, "--spec is set"),
    ],
)
def test_an_unusable_model_setting_is_named(settings, message):
    transformer = tiny_config(msa_indexer_head_dim=6)
    with pytest.raises(ConfigError, match=re.escape(message)):
        MSAModelConfig(transformer=transformer, **{"position_embedding_type": "rope"} | settings)


def test_the_index_head_needs_the_width_of_the_rotary_embedding_only_if_there_is_one():
    transformer = tiny_config(msa_indexer_head_dim=4)
    MSAModelConfig(transformer=transformer, position_embedding_type="rope", rotary_percent=0.5)
    MSAModelConfig(transformer=transformer, position_embedding_type="none", rotary_percent=1.0)


def test_defaults_are_the_papers():
    config = MSATransformerConfig(
        num_layers=1,
        hidden_size=1024,
        num_attention_heads=8,
        kv_channels=128,
        attention_dropout=0.0,
        transformer_impl="local",
        msa_schedule="warmup@0,sparse@10",
    )
    assert (config.msa_block_size, config.msa_num_selected_blocks, config.msa_loss_coeff) == (128, 16, 1.0)
    assert config.msa_indexer_head_dim == config.kv_channels == 128
    assert config.msa_layer_pattern() == [1]
    assert config.phase_schedule().phases == (Phase.WARMUP, Phase.SPARSE)


def test_the_number_of_groups_may_be_left_to_megatron():
    assert tiny_config(num_query_groups=None).num_query_groups == 4


def test_layers_are_saved_one_by_one_only_where_they_differ():
    assert not tiny_config().hetereogenous_dist_checkpoint
    assert not tiny_config(msa_layer_freq="[0,0]").hetereogenous_dist_checkpoint
    assert tiny_config(msa_layer_freq="[0,1]").hetereogenous_dist_checkpoint


def test_every_field_is_named_msa_and_documented():
    names = msa_field_names()
    assert len(names) >= 10
    assert all(name.startswith("msa_") for name in names)
    inherited = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert inherited.isdisjoint(names)


@pytest.mark.parametrize(("pads", "parallel", "size"), [(False, 1, 100), (True, 1, 104), (True, 2, 112)])
def test_the_vocabulary_is_padded_to_divide_by_tensor_parallel_ranks(pads, parallel, size):
    config = MSAModelConfig(
        transformer=tiny_config(tensor_model_parallel_size=parallel),
        vocab_size=100,
        should_pad_vocab=pads,
        make_vocab_size_divisible_by=8,
    )
    assert padded_vocab_size(config) == size


def test_a_configuration_survives_being_written_down():
    config = MSAModelConfig(transformer=tiny_config(), vocab_size=64, position_embedding_type="rope")
    again = MSAModelConfig.from_dict(config.as_dict() | {"rotary_percent": 0.5})
    assert isinstance(again, MSAModelConfig)
    assert again.transformer.msa_schedule == "sparse@0"
    assert again.transformer.params_dtype is torch.float32
