"""Activation recomputation changes no number, counts the KL once and replays the selection."""

import pytest
import torch

from megatron_msa.attention import self_attention
from megatron_msa.attention.layer_metrics import QUALITY_NAMES, msa_layers
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    SEQUENCE,
    assert_same,
    gradients,
    kl_of,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
    with_weights_of,
)

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTATIONS = {
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "core attention and MLP": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full, one layer": FULL,
    "full, two layers": FULL | {"recompute_num_layers": 2},
}
LAYERS = 2


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The block ids of every call of block_select, in order."""
    calls = []

    def counted(*args, **kwargs):
        selection = block_select(*args, **kwargs)
        calls.append(selection.block_ids)
        return selection

    block_select = self_attention.block_select
    monkeypatch.setattr(self_attention, "block_select", counted)
    return calls


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
@pytest.mark.parametrize("phase", list(Phase))
def test_losses_gradients_and_kl_are_those_without_recomputation(phase, recomputation):
    plain = tiny_model()
    recomputing = with_weights_of(plain, tiny_config(**RECOMPUTATIONS[recomputation]))
    batch = random_tokens()
    losses, found, kl = [], [], []
    for model in (plain, recomputing):
        set_phase(model, phase)
        losses.append(token_losses(model, *batch))
        losses[-1].mean().backward()
        found.append(gradients(model))
        kl.append(kl_of(model))
    assert torch.equal(losses[0], losses[1])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-15, msg=name)
    if phase is Phase.DENSE:
        assert kl == [[None] * LAYERS] * 2
    else:
        assert all(torch.equal(a, b) for a, b in zip(*kl, strict=True))
        assert all(sums[1] == batch[0].numel() * 2 for sums in kl[1]), "each row and group counts once"


def test_selective_recomputation_replays_the_selection(selections):
    model = tiny_model(tiny_config(**RECOMPUTATIONS["core attention"]))
    losses = token_losses(model, *random_tokens())
    assert len(selections) == LAYERS
    losses.mean().backward()
    assert len(selections) == LAYERS


def test_full_recomputation_selects_the_same_blocks_again(selections):
    model = tiny_model(tiny_config(**FULL))
    token_losses(model, *random_tokens()).mean().backward()
    assert len(selections) == 2 * LAYERS
    forward, backward = selections[:LAYERS], selections[LAYERS:][::-1]  # the backward pass runs from the end
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
def test_the_selection_quality_is_measured_once(recomputation):
    plain = tiny_model()
    recomputing = with_weights_of(plain, tiny_config(**RECOMPUTATIONS[recomputation]))
    batch = random_tokens()
    sums = []
    for model in (plain, recomputing):
        for layer in msa_layers(model):
            layer.sample_quality = True
        token_losses(model, *batch).mean().backward()
        assert not any(layer.sample_quality for layer in msa_layers(model))
        sums.append([layer.metrics.sums for layer in msa_layers(model)])
    for expected, actual in zip(*sums, strict=True):
        assert expected["block_recall"][1] > SEQUENCE
        assert all(torch.equal(actual[name], expected[name]) for name in QUALITY_NAMES)


def test_two_microbatches_add_up_under_recomputation():
    plain = tiny_model()
    recomputing = with_weights_of(plain, tiny_config(**RECOMPUTATIONS["core attention"]))
    batches = [random_tokens(), random_tokens()]
    found = []
    for model in (plain, recomputing):
        for batch in batches:
            token_losses(model, *batch).mean().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0], tolerance=1e-12)
