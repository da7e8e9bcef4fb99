"""Activation recomputation changes no number, counts the KL once and replays the selection."""

import gc
import weakref

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_msa.attention import self_attention
from megatron_msa.attention.layer_metrics import QUALITY_NAMES, msa_layers
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

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTATIONS = {
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "core attention and MLP": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full, one layer": FULL,
    "full, two layers": FULL | {"recompute_num_layers": 2},
    "full, the first layer": FULL | {"recompute_method": "block"},
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


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
def test_each_layer_selects_once_per_microbatch(selections, recomputation):
    model = tiny_model(tiny_config(**RECOMPUTATIONS[recomputation]))
    losses = [token_losses(model, *random_tokens()) for _ in range(3)]
    assert len(selections) == 3 * LAYERS
    for microbatch in (1, 0, 2):
        losses[microbatch].mean().backward()
    assert len(selections) == 3 * LAYERS


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The block ids of every call of sparse_attention, in order."""
    calls = []

    def recorded(q, k, v, block_ids, *args, **kwargs):
        calls.append(block_ids)
        return sparse_attention(q, k, v, block_ids, *args, **kwargs)

    sparse_attention = self_attention.sparse_attention
    monkeypatch.setattr(self_attention, "sparse_attention", recorded)
    return calls


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
def test_the_first_selection_is_replayed_whatever_has_changed_since(selections, attended, recomputation):
    """Several microbatches in flight, an evaluation among them, backward in another order, and new scores."""
    model = tiny_model(tiny_config(**RECOMPUTATIONS[recomputation]))
    batches = [random_tokens() for _ in range(3)]
    losses = [token_losses(model, *batch) for batch in batches]
    first = [selections[LAYERS * i : LAYERS * (i + 1)] for i in range(3)]
    model.eval()
    with torch.no_grad():
        token_losses(model, *random_tokens())
    model.train()
    for name, parameter in model.named_parameters():
        if is_index(name):
            parameter.data.normal_()  # unseen by autograd, like noise
    del selections[:]

    for microbatch in (2, 0, 1):
        del attended[:]
        losses[microbatch].mean().backward()
        places = [ids.data_ptr() for ids in first[microbatch]]
        replayed = sorted(places.index(ids.data_ptr()) for ids in attended)
        assert replayed == list(range(1 if "first layer" in recomputation else LAYERS))
    assert not selections
    token_losses(model, *batches[0])  # the changed branch does choose other blocks
    assert not torch.equal(selections[0], first[0][0])


def test_an_abandoned_forward_pass_leaves_nothing_behind(selections, monkeypatch):
    model = tiny_model(tiny_config(**FULL))
    batch = random_tokens()
    expected = token_losses(model, *batch)
    second = list(msa_layers(model))[1]
    with monkeypatch.context() as patch:
        patch.setattr(second, "_run_core_attention", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            token_losses(model, *random_tokens())
    kept = [weakref.ref(ids) for ids in selections[LAYERS:]]
    assert len(kept) == LAYERS
    del selections[LAYERS:]
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    losses = token_losses(model, *batch)
    assert torch.equal(losses, expected)
    losses.mean().backward()
    assert len(selections) == 2 * LAYERS


def test_a_checkpoint_within_a_checkpoint_replays_too(selections):
    """Not a setting of Megatron's today, but what a recomputed module that recomputes itself would do."""
    model = tiny_model(tiny_config(**FULL))
    tokens, labels = random_tokens()
    dummy = torch.ones((), requires_grad=True)

    def nested(scale):
        return token_losses(model, tokens, labels) * scale

    tensor_parallel.checkpoint(nested, False, dummy).mean().backward()
    assert len(selections) == LAYERS


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
