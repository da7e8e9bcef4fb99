"""The norm over all heads together, against torch's own on the flattened heads."""

import pytest
import torch

from megatron_msa.attention.full_width_norm import FullWidthRMSNorm
from megatron_msa.errors import ConfigError
from tests.attention.tiny import initial_model, tiny_config

HEADS, DIM = 3, 5


@pytest.mark.parametrize("zero_centered", [False, True])
def test_it_normalises_over_heads_and_dimensions(zero_centered: bool) -> None:
    config = tiny_config(layernorm_zero_centered_gamma=zero_centered)
    norm = FullWidthRMSNorm(config, DIM, 1e-3, num_heads=HEADS).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 2, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    output = norm(x)
    output.cos().sum().backward()
    gradients = x.grad, norm.weight.grad
    assert gradients[0] is not None

    x2 = x.detach().requires_grad_()
    weight = norm.weight.detach().requires_grad_()
    gain = weight + 1 if zero_centered else weight
    expected = torch.nn.functional.rms_norm(x2.flatten(2), (HEADS * DIM,), gain, 1e-3).view_as(x)
    expected.cos().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, (x2.grad, weight.grad), rtol=1e-12, atol=1e-12)


def test_the_model_starts_with_gain_one_and_keeps_a_norm_per_head_in_the_index_branch() -> None:
    model = initial_model(tiny_config(msa_full_width_qk_norm=True))
    attention = model.decoder.layers[0].self_attention
    assert attention.q_layernorm.weight.shape == (4 * 8,)
    assert attention.k_layernorm.weight.shape == (2 * 8,)
    assert attention.index_branch.index_q_layernorm.weight.shape == (12,)
    assert (attention.q_layernorm.weight == 1).all()


def test_it_needs_a_norm_on_q_and_k() -> None:
    with pytest.raises(ConfigError, match="--msa-full-width-qk-norm needs --qk-layernorm"):
        tiny_config(msa_full_width_qk_norm=True, qk_layernorm=False)
