"""Which modules a layer is made of, and which layers a pipeline stage builds."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm

from megatron_msa.attention import layer_specs
from megatron_msa.attention.cached_attention import CachedSelfAttention
from megatron_msa.attention.dense_attention import DocumentAttention
from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.attention.layer_specs import msa_block_spec, msa_layer_specs, msa_mtp_spec
from megatron_msa.attention.rms_norm import RMSNorm
from megatron_msa.attention.self_attention import MSASelfAttention
from megatron_msa.phases import Phase
from megatron_msa.training.layer_reduction import numbered_layers
from tests.attention.tiny import (
    gradients,
    is_index,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
)

MOE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


def attention_modules(specs: list[ModuleSpec]) -> list[type]:
    return [spec.submodules.self_attention.module for spec in specs]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("1", [1, 1, 1, 1]), ("2", [1, 0, 1, 0]), ("([0]*1+[1]*3)", [0, 1, 1, 1]), ("[0]*4", [0, 0, 0, 0])],
)
def test_the_pattern_says_which_layers_are_msa(pattern, expected):
    config = tiny_config(num_layers=4, msa_layer_freq=pattern)
    modules = attention_modules(msa_layer_specs(config))
    assert modules == [MSASelfAttention if is_msa else CachedSelfAttention for is_msa in expected]


def test_full_attention_layers_have_no_index_parameters_and_take_part_in_no_phase():
    model = tiny_model(tiny_config(num_layers=3, msa_layer_freq="[0,1,0]"))
    with_index = {name.split(".")[2] for name, _ in model.named_parameters() if is_index(name)}
    assert with_index == {"1"}
    assert [layer.layer_number for layer in msa_layers(model)] == [2]
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, DocumentAttention)
    token_losses(model, *random_tokens()).mean().backward()
    gradients(model)  # asserts that every parameter has one


def test_megatrons_specs_stay_as_they_are(monkeypatch):
    """Its layers share spec objects, so a change in place would reach other layers."""
    originals = []
    build = gpt_layer_specs.get_gpt_decoder_layer_specs

    def record(*args, **kwargs):
        originals.extend(build(*args, **kwargs))
        return originals

    monkeypatch.setattr(layer_specs, "get_gpt_decoder_layer_specs", record)
    config = tiny_config(num_layers=3, msa_layer_freq="[0,1,1]")
    specs = msa_layer_specs(config)
    untouched = build(config, False, normalization="RMSNorm", qk_l2_norm=False)
    assert originals[0] is originals[1]
    for original, expected in zip(originals, untouched, strict=True):
        assert original.submodules.self_attention == expected.submodules.self_attention
        assert original.submodules.input_layernorm == expected.submodules.input_layernorm
        assert original.submodules.sharded_state_dict_keys_map == (
            expected.submodules.sharded_state_dict_keys_map
        )
    submodules = [spec.submodules for spec in specs]
    assert len({id(each) for each in submodules}) == 3
    assert len({id(each.self_attention) for each in submodules}) == 3
    assert len({id(each.self_attention.submodules) for each in submodules}) == 3


def test_local_layers_use_this_packages_norm_and_attention():
    dense, msa = msa_layer_specs(tiny_config(msa_layer_freq="[0,1]"))
    for spec in (dense, msa):
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
        assert attention.q_layernorm is attention.k_layernorm is RMSNorm
        assert attention.core_attention is DocumentAttention
        assert attention.linear_qkv is ColumnParallelLinear
    index = msa.submodules.self_attention.submodules.index_branch
    assert index.linear_index_q is ColumnParallelLinear
    assert index.index_norm is RMSNorm
    assert msa_block_spec(tiny_config()).layer_norm is RMSNorm


@pytest.mark.parametrize(
    ("changes", "main_norm", "index_norm"),
    [
        ({"qk_layernorm": False}, IdentityOp, None),
        ({"qk_layernorm": False, "qk_l2_norm": True}, L2Norm, L2Norm),
        ({"qk_layernorm": True, "qk_l2_norm": True}, L2Norm, L2Norm),
        ({"qk_layernorm": True}, RMSNorm, RMSNorm),
    ],
)
def test_the_index_norm_follows_the_norm_of_q_and_k(changes, main_norm, index_norm):
    (spec, _) = msa_layer_specs(tiny_config(**changes))
    attention = spec.submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is main_norm
    assert attention.index_branch.index_norm is index_norm


def test_a_mixture_of_experts_with_a_dense_first_layer_trains():
    config = tiny_config(num_layers=3, moe_layer_freq=[0, 1, 1], msa_layer_freq="[0,1,1]", **MOE)
    model = tiny_model(config).float()  # Megatron's router works in fp32
    assert [hasattr(layer.mlp, "experts") for layer in model.decoder.layers] == [False, True, True]
    token_losses(model, *random_tokens()).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(found[name].abs().max() > 0 for name in found if is_index(name))


# -- pipeline stages -----------------------------------------------------------------------------------------


@pytest.fixture
def as_pipeline_rank(monkeypatch):
    def set_rank(rank: int, virtual_size: int | None = None) -> None:
        monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", rank)
        monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", 2)
        name = "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"
        assert hasattr(parallel_state, name)
        monkeypatch.setattr(parallel_state, name, virtual_size)

    return set_rank


@pytest.fixture
def numbered_specs(monkeypatch):
    """Layer specs of the whole model that carry their number."""
    monkeypatch.setattr(
        layer_specs, "msa_layer_specs", lambda config: [f"layer {i}" for i in range(config.num_layers)]
    )


def stage(config, vp_stage=None) -> list[int]:
    return [int(spec.split()[1]) for spec in msa_block_spec(config, vp_stage).layer_specs]


PIPELINE = {"pipeline_dtype": torch.float32, "pipeline_model_parallel_size": 2, "num_layers": 8}


@pytest.mark.usefixtures("numbered_specs")
def test_without_a_pipeline_a_stage_builds_every_layer():
    assert stage(tiny_config(num_layers=5)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("numbered_specs")
@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, {(0, None): [0, 1, 2, 3], (1, None): [4, 5, 6, 7]}),
        ({"num_layers_in_first_pipeline_stage": 3}, {(0, None): [0, 1, 2], (1, None): [3, 4, 5, 6, 7]}),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            {(0, 0): [0, 1], (1, 0): [2, 3], (0, 1): [4, 5], (1, 1): [6, 7]},
        ),
        (
            {"pipeline_model_parallel_layout": "Et|tt|tttt|tL"},
            {(0, 0): [0], (1, 0): [1, 2], (0, 1): [3, 4, 5, 6], (1, 1): [7]},
        ),
    ],
    ids=["even", "uneven", "virtual stages", "custom layout"],
)
def test_pipeline_stages_build_their_own_layers(changes, stages, as_pipeline_rank):
    config = tiny_config(**PIPELINE, **changes)
    found = {}
    for rank, vp_stage in stages:
        as_pipeline_rank(rank, config.virtual_pipeline_model_parallel_size)
        found[rank, vp_stage] = stage(config, vp_stage)
    assert found == stages


def test_a_stage_keeps_the_pattern_of_its_layers(as_pipeline_rank):
    as_pipeline_rank(1)
    config = tiny_config(**PIPELINE, msa_layer_freq="[0]*5+[1]*3")
    modules = attention_modules(msa_block_spec(config).layer_specs)
    assert modules == [CachedSelfAttention, *[MSASelfAttention] * 3]


# -- multi-token prediction ----------------------------------------------------------------------------------


def test_prediction_layers_train_and_are_numbered_behind_the_decoders():
    config = tiny_config(
        num_layers=3, mtp_num_layers=2, msa_layer_freq="[0,1,1]", layernorm_zero_centered_gamma=True
    )
    model = tiny_model(config)
    tokens, labels = random_tokens()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    model(tokens, positions, None, labels=labels).mean().backward()
    gradients(model)  # asserts that every parameter has one
    layers = numbered_layers([model], num_decoder_layers=3)
    assert [number for number, _ in layers] == [2, 3, 4, 5]
    assert all(layer.metrics.sums["kl"][1] == 2 * tokens.numel() for _, layer in layers)

    set_phase(model, Phase.DENSE)
    model(tokens, positions, None, labels=labels).mean().backward()
    assert not any(value.any() for name, value in gradients(model).items() if is_index(name))


def test_prediction_layers_are_built_like_the_last_decoder_layer():
    config = tiny_config(mtp_num_layers=1, msa_layer_freq="[1,0]")
    (spec,) = msa_mtp_spec(config).layer_specs
    layer = spec.submodules
    assert layer.mtp_model_layer.submodules.self_attention.module is CachedSelfAttention
    assert layer.enorm is layer.hnorm is layer.layer_norm is RMSNorm
    assert msa_mtp_spec(tiny_config()) is None


def test_prediction_layers_are_built_on_the_last_stage_only(as_pipeline_rank):
    as_pipeline_rank(0)
    config = tiny_config(**PIPELINE, mtp_num_layers=1)
    assert msa_mtp_spec(config) is None
    as_pipeline_rank(1)
    assert len(msa_mtp_spec(config).layer_specs) == 1


# -- Transformer Engine --------------------------------------------------------------------------------------


@pytest.fixture
def transformer_engine(monkeypatch):
    """Megatron's own choice of modules; without the library it only lacks the name in one module.

    The classes are there but cannot be built, so these tests look at specs and not at models.
    """
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", te.TENorm)
    # Megatron asks for the version: older ones have no norm for q and k.
    monkeypatch.setattr(
        "megatron.core.extensions.transformer_engine_spec_provider.is_te_min_version", lambda version: True
    )


def te_config(**changes):
    return tiny_config(transformer_impl="transformer_engine", **changes)


@pytest.mark.usefixtures("transformer_engine")
def test_with_transformer_engine_msa_layers_have_an_unfused_norm_and_projection():
    dense, msa = (spec.submodules for spec in msa_layer_specs(te_config(msa_layer_freq="[0,1]")))
    assert msa.input_layernorm is te.TENorm
    attention = msa.self_attention.submodules
    assert attention.linear_qkv is te.TEColumnParallelLinear
    assert attention.index_branch.linear_index_q is ColumnParallelLinear  # 8-bit training leaves it alone
    assert attention.linear_proj is te.TERowParallelLinear
    assert attention.core_attention is te.TEDotProductAttention
    assert attention.q_layernorm is attention.k_layernorm is attention.index_branch.index_norm is te.TENorm

    assert dense.input_layernorm is IdentityOp
    assert dense.self_attention.submodules.linear_qkv is te.TELayerNormColumnParallelLinear
    assert msa_block_spec(te_config()).layer_norm is te.TENorm


@pytest.mark.usefixtures("transformer_engine")
def test_with_transformer_engine_full_attention_layers_are_megatrons_own():
    config = te_config(msa_layer_freq="[0,0]", moe_layer_freq=[0, 1], **MOE)
    specs = msa_layer_specs(config)
    expected = gpt_layer_specs.get_gpt_decoder_layer_specs(config, True, normalization="RMSNorm")
    for spec, original in zip(specs, expected, strict=True):
        for name in ("input_layernorm", "pre_mlp_layernorm", "sharded_state_dict_keys_map"):
            assert getattr(spec.submodules, name) == getattr(original.submodules, name)
        attention = original.submodules.self_attention
        assert spec.submodules.self_attention == replace(attention, module=CachedSelfAttention)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("moe", [False, True])
def test_with_transformer_engine_the_norm_is_saved_where_dense_layers_save_theirs(moe):
    config = te_config(msa_layer_freq="[0,1]", **(MOE if moe else {}))
    dense, msa = (spec.submodules for spec in msa_layer_specs(config))
    moved = copy.copy(msa.sharded_state_dict_keys_map)
    assert moved.pop("input_layernorm.") == "self_attention.linear_qkv.layer_norm_"
    assert moved == dense.sharded_state_dict_keys_map, "everything else is saved as in a dense layer"
    assert type(msa.mlp) is type(dense.mlp)
    assert msa.pre_mlp_layernorm is dense.pre_mlp_layernorm


@pytest.mark.usefixtures("transformer_engine")
def test_with_transformer_engine_prediction_layers_use_its_norm():
    (spec,) = msa_mtp_spec(te_config(mtp_num_layers=1)).layer_specs
    layer = spec.submodules
    assert layer.enorm is layer.hnorm is layer.layer_norm is te.TENorm
    assert layer.mtp_model_layer.submodules.self_attention.module is MSASelfAttention
