"""MSA layers under Megatron's schedule: microbatches, loss scale, per-token loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_msa.phases import Phase
from tests.attention.tiny import (
    SEQUENCE,
    assert_same,
    gradients,
    is_index,
    kl_of,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
    with_weights_of,
)

PHASES = [Phase.WARMUP, Phase.SPARSE]
Microbatch = tuple[Tensor, Tensor, Tensor]  # tokens, labels, mask


def divide_by_tokens(models: list[GPTModel], num_tokens: Tensor | None, **_: Any) -> None:
    """What Megatron's `finalize_model_grads` does on one rank."""
    if num_tokens is not None:
        for parameter in models[0].parameters():
            parameter.grad /= num_tokens


def train_step(model: GPTModel, microbatches: list[Microbatch]) -> dict[str, Tensor]:
    """The gradients of one step of Megatron's schedule."""

    def forward_step(batches: Iterator[Microbatch], model: GPTModel) -> tuple[Tensor, Any]:
        tokens, labels, mask = next(batches)

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict]:
            return (losses * mask).sum(), mask.sum().to(torch.int), {}

        return token_losses(model, tokens, labels), loss_function

    model.config.finalize_model_grads_func = divide_by_tokens
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=SEQUENCE,
        micro_batch_size=microbatches[0][0].shape[0],
        forward_only=False,
    )
    return gradients(model)


def one_batch_and_its_halves(*, masked: bool) -> tuple[Microbatch, list[Microbatch]]:
    tokens, labels = random_tokens(batch=2)
    mask = torch.ones_like(tokens, dtype=torch.float64)
    if masked:
        mask[0, 3:20] = 0  # the halves have different numbers of counted tokens
    halves = [(tokens[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(2)]
    return (tokens, labels, mask), halves


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_two_microbatches_equal_one_of_double_size(phase, per_token):
    model = tiny_model(tiny_config(calculate_per_token_loss=per_token, msa_loss_coeff=0.5))
    set_phase(model, phase)
    # Without per-token loss Megatron averages the microbatches' means, whatever their numbers of tokens.
    whole, halves = one_batch_and_its_halves(masked=per_token)
    expected, expected_kl = train_step(model, [whole]), kl_of(model)
    assert_same(train_step(model, halves), expected)
    for sums, expected_sums in zip(kl_of(model), expected_kl, strict=True):
        torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)


@pytest.mark.parametrize("phase", PHASES)
def test_per_token_loss_equals_the_mean_when_every_token_counts(phase):
    mean = tiny_model()
    per_token = with_weights_of(mean, tiny_config(calculate_per_token_loss=True))
    _, halves = one_batch_and_its_halves(masked=False)
    found = []
    for model in (mean, per_token):
        set_phase(model, phase)
        found.append(train_step(model, halves))
    assert_same(found[1], found[0])


def test_with_masked_tokens_per_token_loss_weighs_the_kl_by_rows_over_counted_tokens():
    """The KL has a row for every token, counted or not, and Megatron divides by the counted ones."""
    mean = tiny_model()
    per_token = with_weights_of(mean, tiny_config(calculate_per_token_loss=True))
    whole, _ = one_batch_and_its_halves(masked=True)
    mask = whole[2]
    factor = mask.numel() / mask.sum()
    assert factor > 1.3
    expected = train_step(mean, [whole])
    expected = {name: value * (factor if is_index(name) else 1) for name, value in expected.items()}
    assert_same(train_step(per_token, [whole]), expected)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_loss_scale_of_mixed_precision_scales_backbone_and_index_branch_alike(per_token):
    plain = tiny_model(tiny_config(calculate_per_token_loss=per_token))
    scaled_config = tiny_config(calculate_per_token_loss=per_token, grad_scale_func=lambda loss: loss * 1024)
    scaled = with_weights_of(plain, scaled_config)
    _, halves = one_batch_and_its_halves(masked=False)
    expected = {name: 1024 * value for name, value in train_step(plain, halves).items()}
    assert_same(train_step(scaled, halves), expected)
