"""What a checkpoint holds: the names and shapes of Megatron's dense GPT, and the index branch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_msa.config import msa_field_names
from tests.attention.tiny import VOCABULARY, is_index, tiny_config, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no q and k norm": {"qk_layernorm": False},
    "biases and gate": {"add_bias_linear": True, "attention_output_gate": True},
    "LayerNorm": {"normalization": "LayerNorm"},
    "mixture of experts": {
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1],
        "moe_ffn_hidden_size": 16,
        "moe_router_load_balancing_type": "none",
    },
    "not every layer is MSA": {"msa_layer_freq": "[0,1]"},
    "multi-token prediction": {"mtp_num_layers": 1},
}
# Fields that the constructor fills in itself, or that are not settings.
DERIVED = {"experimental_attention_variant_loss_scale_func", "_cpu_offloading_context"}


def megatrons_own_model(**changes: Any) -> torch.nn.Module:
    """The dense GPT that Megatron builds from the same settings."""
    config = tiny_config(**changes)
    settings = {
        name: getattr(config, name)
        for name, field in TransformerConfig.__dataclass_fields__.items()
        if field.init and name not in {*msa_field_names(), *DERIVED}
    }
    model_config = GPTModelConfig(
        transformer=TransformerConfig(**settings),
        vocab_size=VOCABULARY,
        seq_length=64,
        position_embedding_type="rope",
        rotary_percent=0.5,
    )
    return GPTModelBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def sharded_tensors(model: torch.nn.Module) -> dict[str, Any]:
    """Key -> (global shape, number of leading axes that count layers or experts)."""
    entries = [entry for entry in model.sharded_state_dict().values() if isinstance(entry, ShardedTensor)]
    return {entry.key: (entry.global_shape, entry.prepend_axis_num) for entry in entries}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backbone_is_saved_under_the_names_and_shapes_of_megatrons_dense_model(variant):
    dense = sharded_tensors(megatrons_own_model(**VARIANTS[variant]))
    msa = sharded_tensors(tiny_model(tiny_config(**VARIANTS[variant])).float())
    assert {key: value for key, value in msa.items() if not is_index(key)} == dense


def test_every_parameter_of_the_index_branch_is_saved():
    model = tiny_model()
    prefix = "decoder.layers.self_attention.index_branch."
    found = {key: shape for key, (shape, _) in sharded_tensors(model).items() if is_index(key)}
    num_layers, groups, head_dim, hidden = 2, 2, 12, 32
    assert found == {
        f"{prefix}linear_index_q.weight": (num_layers, groups * head_dim, hidden),
        f"{prefix}linear_index_k.weight": (num_layers, head_dim, hidden),
        f"{prefix}index_q_layernorm.weight": (num_layers, head_dim),
        f"{prefix}index_k_norm.weight": (num_layers, head_dim),
    }
    parameters = {id(value) for name, value in model.named_parameters() if is_index(name)}
    saved = {id(entry.data) for entry in model.sharded_state_dict().values() if hasattr(entry, "data")}
    assert len(parameters) == num_layers * 4
    assert parameters <= saved, "the saved tensors are the parameters, not copies"


def test_layers_with_and_without_an_index_branch_are_saved_one_by_one():
    model = tiny_model(tiny_config(msa_layer_freq="[0,1]"))
    keys = {key for key in sharded_tensors(model) if is_index(key)}
    assert len(keys) == 4
    assert all(key.startswith("decoder.layers.1.self_attention.index_branch.") for key in keys)


@pytest.mark.parametrize("pattern", ["[1,1]", "[0,1]"])
def test_a_saved_model_loads_into_a_new_one(pattern, tmp_path: Path):
    config = tiny_config(msa_layer_freq=pattern)
    saved, loaded = tiny_model(config), tiny_model(config)
    dist_checkpointing.save(saved.sharded_state_dict(), str(tmp_path))
    loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), str(tmp_path)))
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in saved.named_parameters())
