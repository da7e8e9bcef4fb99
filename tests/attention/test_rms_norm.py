"""RMSNorm of the local specs against torch's own."""

from typing import Any

import pytest
import torch
from torch.nn.functional import rms_norm

from megatron_msa.training.no_gpu import install_if_no_gpu

install_if_no_gpu()

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_msa.attention.rms_norm import RMSNorm  # noqa: E402


def config(**kwargs: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **kwargs)


def test_it_equals_torch() -> None:
    norm = RMSNorm(config=config(), hidden_size=64, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 64)
    torch.testing.assert_close(norm(x), rms_norm(x, (64,), norm.weight, 1e-6))


def test_it_starts_as_the_plain_norm_in_both_conventions() -> None:
    x = torch.randn(7, 64)
    plain = RMSNorm(config=config(), hidden_size=64)
    centred = RMSNorm(config=config(layernorm_zero_centered_gamma=True), hidden_size=64)
    assert plain.weight.eq(1).all()
    assert centred.weight.eq(0).all()
    assert torch.equal(plain(x), centred(x))


def test_a_zero_centred_weight_is_added_to_one() -> None:
    norm = RMSNorm(config=config(layernorm_zero_centered_gamma=True), hidden_size=16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(norm(x), rms_norm(x, (16,), 1 + norm.weight, 1e-6))


@pytest.mark.parametrize("zero_centred", [False, True])
def test_bf16_is_computed_in_fp32_and_rounded_once(zero_centred: bool) -> None:
    norm = RMSNorm(config=config(layernorm_zero_centered_gamma=zero_centred), hidden_size=64).bfloat16()
    torch.nn.init.normal_(norm.weight, std=0.02)
    x = torch.randn(50, 64).mul(1000).to(torch.bfloat16)
    gain = norm.weight.double() + zero_centred
    expected = rms_norm(x.double(), (64,), gain, norm.eps)
    assert norm(x).dtype == torch.bfloat16
    # bf16 keeps 8 significant bits: rounding once moves a value by 2^-8 of it at most.
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8 * 1.001, atol=0)


def test_fp64_is_computed_in_fp64() -> None:
    norm = RMSNorm(config=config(layernorm_zero_centered_gamma=True), hidden_size=64).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 64, dtype=torch.float64)
    torch.testing.assert_close(norm(x), rms_norm(x, (64,), 1 + norm.weight, norm.eps), rtol=1e-14, atol=0)


def test_gradients_are_those_of_torch() -> None:
    norm = RMSNorm(config=config(layernorm_zero_centered_gamma=True), hidden_size=16)
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach().clone().requires_grad_()
    x = torch.randn(6, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(6, 16)
    norm(x).backward(upstream)
    rms_norm(y, (16,), 1 + weight, norm.eps).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(norm.weight.grad, weight.grad)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_tells_megatron_to_sum_its_gradient(sequence_parallel: bool) -> None:
    tp_size = 2 if sequence_parallel else 1
    parallel = config(sequence_parallel=sequence_parallel, tensor_model_parallel_size=tp_size)
    norm = RMSNorm(config=parallel, hidden_size=64)
    assert norm.weight.sequence_parallel is sequence_parallel
    assert list(norm.state_dict()) == ["weight"]


def test_the_weight_has_the_dtype_of_the_parameters_and_other_arguments_are_ignored() -> None:
    bf16 = config(bf16=True, params_dtype=torch.bfloat16)
    norm = RMSNorm(config=bf16, hidden_size=8, eps=1e-5, persist_layer_norm=True)
    assert norm.weight.dtype == torch.bfloat16
