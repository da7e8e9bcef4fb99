"""The KL loss of MSA layers: its value, its gradient, its scale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_msa.attention.kl_loss import attach_loss, kl_objective, set_loss_scale
from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    ALL_BLOCKS,
    BLOCK,
    SEQUENCE,
    assert_same,
    gradients,
    index_gradients,
    is_index,
    kl_of,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
    with_weights_of,
)

WITH_KL = [Phase.INDEX_ONLY, Phase.WARMUP, Phase.SPARSE]
BATCH = 2
GROUPS = 2


def record_core_inputs(model: GPTModel) -> list[dict[str, Any]]:
    """What each MSA layer's core attention gets in the next forward pass, with its autograd graph."""
    recorded = []
    for layer in msa_layers(model):

        def spy(query, key, value, mask, *, run: Callable[..., Tensor] = layer._run_core_attention, **rest):
            recorded.append({"query": query, "key": key, **rest})
            return run(query, key, value, mask, **rest)

        layer._run_core_attention = spy
    return recorded


def kl_by_hand(inputs: dict[str, Any]) -> Tensor:
    """KL(P || S) of every sequence, token and group, straight from the definition: [b, s, groups]."""
    # All are packed, [b * s, heads, d], sequence after sequence.
    query, key = inputs["query"].detach(), inputs["key"].detach()  # the teacher is a constant
    index_query, index_key, block_ids = inputs["index_query"], inputs["index_key"], inputs.get("block_ids")
    groups = index_query.shape[1]
    heads = query.shape[1] // groups
    rows = []
    for token in range(query.shape[0]):
        first, i = token - token % SEQUENCE, token % SEQUENCE
        for r in range(groups):
            seen = torch.arange(i + 1, device=query.device)
            if block_ids is not None:
                seen = seen[torch.isin(seen // BLOCK, block_ids[token, r])]
            of_group = query[token, r * heads : (r + 1) * heads]
            scores = of_group @ key[first + seen, r].T / query.shape[-1] ** 0.5
            teacher = scores.softmax(dim=-1).mean(dim=0)
            index_scores = index_key[first + seen, 0] @ index_query[token, r] / index_query.shape[-1] ** 0.5
            rows.append((teacher * (teacher.log() - index_scores.log_softmax(dim=-1))).sum())
    return torch.stack(rows).view(-1, SEQUENCE, groups)


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
@pytest.mark.parametrize("phase", WITH_KL)
def test_value_and_gradient_are_those_of_the_definition(phase, coefficient):
    model = tiny_model(tiny_config(msa_loss_coeff=coefficient))
    set_phase(model, phase)
    recorded = record_core_inputs(model)
    loss = token_losses(model, *random_tokens(BATCH)).mean()
    by_hand = [kl_by_hand(inputs) for inputs in recorded]
    assert len(by_hand) == 2

    for sums, rows in zip(kl_of(model), by_hand, strict=True):
        assert sums[1] == rows.numel() == BATCH * SEQUENCE * GROUPS
        torch.testing.assert_close(sums[0] / sums[1], rows.mean(), rtol=1e-12, atol=0)

    parameters = {name: value for name, value in model.named_parameters() if is_index(name)}
    objective = coefficient * sum(rows.mean() for rows in by_hand)
    expected = torch.autograd.grad(objective, list(parameters.values()), retain_graph=True)
    (0 * loss).backward()
    assert_same(index_gradients(model), dict(zip(parameters, expected, strict=True)))


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.SPARSE])
def test_gradient_equals_finite_differences_of_the_logged_kl(phase):
    coefficient, step = 0.7, 1e-5
    model = tiny_model(tiny_config(msa_loss_coeff=coefficient))
    set_phase(model, phase)
    batch = random_tokens(BATCH)

    def logged_kl() -> float:
        token_losses(model, *batch)
        return sum(float(sums[0] / sums[1]) for sums in kl_of(model))

    (0 * token_losses(model, *batch).mean()).backward()
    kl_of(model)
    found = index_gradients(model)
    parameters = dict(model.named_parameters())
    for name, gradient in found.items():
        entry = gradient.abs().flatten().argmax()  # the largest entry has the smallest relative error
        weight = parameters[name].data.view(-1)
        original = weight[entry].item()
        weight[entry] = original + step
        above = logged_kl()
        weight[entry] = original - step
        below = logged_kl()
        weight[entry] = original
        slope = coefficient * (above - below) / (2 * step)
        # The error of a central difference is of the order of step^2 = 1e-10; cancellation adds
        # 1e-15 / step = 1e-10.
        assert slope == pytest.approx(float(gradient.view(-1)[entry]), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("phase", WITH_KL)
def test_a_loss_scale_multiplies_the_index_gradients_exactly(phase):
    model = tiny_model()
    set_phase(model, phase)
    batch = random_tokens()
    found = []
    for scale in (torch.ones(1), torch.full((1,), 256.0)):  # a power of two: no rounding
        set_loss_scale(scale)
        token_losses(model, *batch).mean().backward()
        found.append(gradients(model))
    for name in found[0]:
        factor = 256 if is_index(name) else 1
        assert torch.equal(found[1][name], factor * found[0][name]), name


def test_without_a_scale_of_the_schedule_the_loss_counts_once():
    model = tiny_model()
    batch = random_tokens()
    token_losses(model, *batch).mean().backward()
    unset = gradients(model)
    set_loss_scale(torch.ones(1))
    token_losses(model, *batch).mean().backward()
    assert_same(gradients(model), unset, tolerance=0)


def test_building_a_layer_tells_megatrons_schedules_where_the_scale_goes():
    config = tiny_config()
    assert config.experimental_attention_variant_loss_scale_func is None
    tiny_model(config)
    assert config.experimental_attention_variant_loss_scale_func is set_loss_scale


@pytest.mark.parametrize("phase", WITH_KL)
def test_per_token_loss_sums_over_rows_instead_of_averaging(phase):
    mean = tiny_model()
    total = with_weights_of(mean, tiny_config(calculate_per_token_loss=True))
    batch = random_tokens(BATCH)
    found = []
    for model in (mean, total):
        set_phase(model, phase)
        token_losses(model, *batch).mean().backward()
        found.append((gradients(model), kl_of(model)))
    rows = BATCH * SEQUENCE
    scaled = {name: value * (rows if is_index(name) else 1) for name, value in found[0][0].items()}
    assert_same(found[1][0], scaled)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True)), "the logged value"


def test_a_batch_of_identical_sequences_has_the_gradient_of_one():
    model = tiny_model(tiny_config(msa_num_selected_blocks=ALL_BLOCKS))
    tokens, labels = random_tokens(batch=1)
    token_losses(model, tokens, labels).mean().backward()
    one = gradients(model)
    token_losses(model, tokens.repeat(3, 1), labels.repeat(3, 1)).mean().backward()
    assert_same(gradients(model), one)


def test_the_objective_divides_by_groups_and_by_the_rows_of_all_context_parallel_ranks():
    rows = torch.full((10, 2), 3.0)  # one rank's 2 of 4 groups, and its 10 of 40 rows
    settings = {"coefficient": 0.5, "num_groups": 4}
    mean = kl_objective(rows, **settings, per_token=False, context_parallel_size=4)
    assert mean == pytest.approx(0.5 * 60 / (4 * 40))
    summed = kl_objective(rows, **settings, per_token=True, context_parallel_size=4)
    assert summed == pytest.approx(0.5 * 60 / 4)


def test_attaching_a_loss_leaves_values_and_incoming_gradients_alone():
    output = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    attached = attach_loss(output, weight.square().sum())
    assert torch.equal(attached, output)
    (attached * 2).sum().backward()
    assert torch.equal(output.grad, torch.full_like(output, 2.0))
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_a_half_precision_output_can_carry_an_fp32_loss():
    output = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, requires_grad=True)
    set_loss_scale(torch.full((1,), 8.0, dtype=torch.float64))
    attach_loss(output, weight.sum()).sum().backward()
    assert output.grad.dtype == torch.bfloat16
    assert torch.equal(weight.grad, torch.full((5,), 8.0))
