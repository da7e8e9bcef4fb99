"""Parameter counts against models that megatron-core 0.19.2 built and the sizes in arXiv 2606.13392."""

from types import SimpleNamespace

import pytest

from megatron_msa.errors import ConfigError
from megatron_msa.training.parameter_count import PARTS, count_parameters


def config(**changes):
    """A three-layer model whose sizes all differ; names as in Megatron's TransformerConfig."""
    values = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 12,
        "ffn_hidden_size": 40,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "msa_full_width_qk_norm": False,
        "gated_linear_unit": True,
        "attention_output_gate": False,
        "num_moe_experts": None,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": None,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "mtp_num_layers": None,
        "msa_indexer_head_dim": None,
        "pattern": None,
    } | changes
    pattern = values.pop("pattern") or [1] * values["num_layers"]
    return SimpleNamespace(**values, msa_layer_pattern=lambda: pattern)


def pilot(**changes):
    """The paper's 10B pilot model."""
    return config(
        **{
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_query_groups": 4,
            "kv_channels": 128,
            "qk_layernorm": True,
            "num_moe_experts": 64,
            "moe_router_topk": 4,
            "moe_ffn_hidden_size": 1536,
            "moe_shared_expert_intermediate_size": 1536,
        }
        | changes
    )


MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1, 1]}
BIASED = {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False}
SHARED = {"moe_shared_expert_intermediate_size": 28}


@pytest.mark.parametrize(
    ("changes", "built"),
    [
        ({}, 35168),
        (BIASED, 32152),
        (BIASED | {"qk_layernorm": True}, 32440),
        ({"qk_layernorm": True, "msa_indexer_head_dim": 20, "pattern": [0, 1, 1]}, 35704),
        ({"qk_layernorm": True, "msa_full_width_qk_norm": True}, 35456),
        ({"add_qkv_bias": True, "attention_output_gate": True}, 40208),
        (MOE, 46176),
        (MOE | SHARED | {"moe_shared_expert_gate": True}, 51616),
        (MOE | SHARED | {"moe_layer_freq": 2, "qk_layernorm": True}, 51696),
        (MOE | {"moe_ffn_hidden_size": None}, 58464),
        (BIASED | MOE | {"moe_layer_freq": 1, "gated_linear_unit": True}, 53260),
        ({"mtp_num_layers": 2}, 58784),
        (MOE | SHARED | {"mtp_num_layers": 1, "qk_layernorm": True}, 71744),
        (MOE | {"mtp_num_layers": 2, "mtp_use_repeated_layer": True}, 63488),
    ],
)
def test_the_total_is_that_of_the_model_that_megatron_builds(changes, built):
    # The numbers are sum(p.numel() for p in GPTModel(...).parameters()), vocabulary 96, untied embeddings.
    count = count_parameters(config(**changes), padded_vocab_size=96, untied_embeddings=True)
    assert count.total == built


def test_tied_embeddings_are_stored_once_and_active_as_the_output_projection():
    tied = count_parameters(config(), padded_vocab_size=96, untied_embeddings=False)
    untied = count_parameters(config(), padded_vocab_size=96, untied_embeddings=True)
    assert tied.total == 32096 == untied.total - 96 * 32
    assert tied.active == untied.active
    assert untied.active_by_part["embedding"] == 0
    assert tied.active_by_part["embedding"] == 96 * 32


def test_the_convention_reproduces_the_sizes_that_the_paper_gives_for_its_pilot_model():
    gqa = count_parameters(pilot(pattern=[0] * 16), padded_vocab_size=200_000, untied_embeddings=False)
    assert round(gqa.total / 1e9, 2) == 10.53
    assert round(gqa.active / 1e9, 2) == 1.47


def test_the_index_branch_adds_two_projections_and_two_gains_per_msa_layer():
    count = count_parameters(
        pilot(pattern=[0] * 6 + [1] * 10), padded_vocab_size=200_000, untied_embeddings=False
    )
    assert count.by_part["index_branch"] == 10 * (2048 * 4 * 128 + 2048 * 128 + 2 * 128)
    assert count.active_by_part["index_branch"] == count.by_part["index_branch"]


def test_only_the_chosen_routed_experts_are_active():
    count = count_parameters(
        config(**MOE, **SHARED, mtp_num_layers=1), padded_vocab_size=96, untied_embeddings=True
    )
    one_expert = 3 * 32 * 24
    idle = 2 * one_expert  # 4 experts, 2 chosen
    assert count.by_part["routed_experts"] == 2 * 4 * one_expert
    assert count.active_by_part["routed_experts"] == 2 * 2 * one_expert
    assert count.by_part["mtp"] - count.active_by_part["mtp"] == idle
    assert count.total - count.active == 3 * idle + 96 * 32  # and the input embedding table


def test_the_parts_are_complete_and_in_order():
    count = count_parameters(config(**MOE, mtp_num_layers=1), padded_vocab_size=96, untied_embeddings=True)
    assert tuple(count.by_part) == tuple(count.active_by_part) == PARTS
    assert sum(count.by_part.values()) == count.total
    assert sum(count.active_by_part.values()) == count.active


def test_the_table_names_the_parts_that_exist_and_no_others():
    table = count_parameters(pilot(), padded_vocab_size=200_000, untied_embeddings=False).describe()
    assert "10.55B" in table
    assert "1.49B" in table
    assert "index_branch" in table
    assert "dense_mlp" not in table


@pytest.mark.parametrize(
    "changes",
    [{"multi_latent_attention": True}, {"moe_latent_size": 16}, {"experimental_attention_variant": "dsa"}],
)
def test_a_model_with_parts_that_are_not_counted_is_refused(changes):
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(ConfigError, match=flag):
        count_parameters(config(**changes), padded_vocab_size=96, untied_embeddings=True)
