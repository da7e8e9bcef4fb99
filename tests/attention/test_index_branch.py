"""The index branch: what it mirrors of the main branch, and the backbones it works with."""

from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from megatron_msa.attention import full_attention, self_attention
from megatron_msa.attention.rms_norm import RMSNorm
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    ALL_BLOCKS,
    DEVICE,
    assert_same,
    backbone_gradients,
    gradients,
    is_index,
    kl_of,
    packed_documents,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
)

BACKBONES: dict[str, dict[str, Any]] = {
    "no q and k norm": {"qk_layernorm": False},
    "L2 norm of q and k": {"qk_layernorm": False, "qk_l2_norm": True},
    "gains around zero": {"layernorm_zero_centered_gamma": True},
    "output gate": {"attention_output_gate": True},
    "clamped quick GeGLU": {
        "activation_func": quick_gelu,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 7.0,
    },
    "index heads as wide as the rotary embedding": {"msa_indexer_head_dim": 4},
    "index heads like the attention heads": {"msa_indexer_head_dim": None},
    "one group": {"num_query_groups": 1},
    "as many groups as heads": {"num_query_groups": 4},
    "biases": {"add_bias_linear": True},
    "a softmax scale of its own": {"softmax_scale": 0.5},
    "LayerNorm": {"normalization": "LayerNorm"},
    "no rotary embedding in the first layer": {"no_rope_freq": [1, 0]},
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_and_with_all_blocks_equals_its_dense_self(backbone):
    model = tiny_model(tiny_config(**BACKBONES[backbone], msa_num_selected_blocks=ALL_BLOCKS))
    batch = random_tokens()
    set_phase(model, Phase.DENSE)
    dense = token_losses(model, *batch)
    dense.mean().backward()
    expected = backbone_gradients(model)
    set_phase(model, Phase.SPARSE)
    sparse = token_losses(model, *batch)
    sparse.mean().backward()
    found = gradients(model)
    assert all(value.abs().max() > 0 for name, value in found.items() if is_index(name))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-11)
    assert_same({name: value for name, value in found.items() if not is_index(name)}, expected)
    assert all(sums[0] > 0 for sums in kl_of(model))


@pytest.mark.parametrize("position_embedding", ["none", "learned_absolute"])
def test_without_a_rotary_embedding_the_index_branch_has_none_either(position_embedding, monkeypatch):
    model = tiny_model(position_embedding_type=position_embedding)
    monkeypatch.setattr(
        full_attention, "apply_rotary_pos_emb", lambda *args, **kwargs: pytest.fail("something was rotated")
    )
    token_losses(model, *random_tokens()).mean().backward()
    assert all(value.abs().max() > 0 for value in gradients(model).values())


def test_index_heads_have_the_norm_of_the_main_heads():
    expected = {
        "RMSNorm": ({}, RMSNorm),
        "LayerNorm": ({"normalization": "LayerNorm"}, torch.nn.LayerNorm),
        "L2": ({"qk_layernorm": False, "qk_l2_norm": True}, L2Norm),
        "none": ({"qk_layernorm": False}, type(None)),
    }
    for changes, norm in expected.values():
        attention = tiny_model(tiny_config(**changes)).decoder.layers[0].self_attention
        branch = attention.index_branch
        for module in (attention.q_layernorm, branch.index_q_layernorm, branch.index_k_norm):
            assert type(module) is norm


def test_shapes_and_the_stop_gradient():
    branch = tiny_model().decoder.layers[0].self_attention.index_branch
    hidden = torch.randn(7, 3, 32, dtype=torch.float64, device=DEVICE, requires_grad=True)
    index_q, index_k = branch(hidden)
    assert index_q.shape == (7, 3, 2, 12)
    assert index_k.shape == (7, 3, 1, 12)
    (index_q.sum() + index_k.sum()).backward()
    assert hidden.grad is None


def test_all_parameters_carry_the_mark_the_optimizer_looks_for():
    for name, parameter in tiny_model().named_parameters():
        assert getattr(parameter, "is_msa_index_parameter", False) == is_index(name), name


def index_scores(model, sequence: int, monkeypatch, packed=None) -> Tensor:
    """Scores [query, key, group] that block_select sees when every token has the same hidden state."""
    seen = {}

    def record(index_q, index_k, *args, **kwargs):
        seen.update(q=index_q, k=index_k[:, 0])
        return block_select(index_q, index_k, *args, **kwargs)

    block_select = self_attention.block_select
    monkeypatch.setattr(self_attention, "block_select", record)
    hidden = torch.randn(32, dtype=torch.float64, device=DEVICE).expand(sequence, 1, 32)
    rotary = model.rotary_pos_emb(packed.max_seqlen_q if packed else sequence, packed_seq=packed is not None)
    model.decoder.layers[0].self_attention(hidden, None, rotary_pos_emb=rotary, packed_seq_params=packed)
    monkeypatch.setattr(self_attention, "block_select", block_select)
    return torch.einsum("qrd,kd->qkr", seen["q"], seen["k"]).detach()


def test_index_scores_depend_on_relative_positions_only(monkeypatch):
    model = tiny_model()
    scores = index_scores(model, 12, monkeypatch)
    for distance in range(12):
        at_distance = scores.diagonal(-distance)  # [group, pairs]
        # fp32: Megatron's rotary angles
        torch.testing.assert_close(at_distance, at_distance[:, :1].expand_as(at_distance), rtol=0, atol=1e-5)
    assert (scores[-1, :-1] - scores[-1, 1:]).abs().min() > 1e-4, "and they do depend on them"


def test_positions_restart_with_every_packed_document(monkeypatch):
    model = tiny_model()
    torch.manual_seed(5)
    packed = index_scores(model, 12, monkeypatch, packed=packed_documents([7, 5]))
    torch.manual_seed(5)
    alone = index_scores(model, 7, monkeypatch)
    torch.testing.assert_close(packed[:7, :7], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[7:, 7:], alone[:5, :5], rtol=0, atol=1e-12)
