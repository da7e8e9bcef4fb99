"""What a layer measures of its selection on a sampled step."""

import pytest
import torch

from megatron_msa.attention import self_attention
from megatron_msa.attention.layer_metrics import QUALITY_NAMES, LayerMetrics, msa_layers
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    ALL_BLOCKS,
    BLOCK,
    SEQUENCE,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
    with_weights_of,
)

BATCH, GROUPS, SELECTED = 2, 2, 3
DROPPING = SEQUENCE - SELECTED * BLOCK
"""Rows of a sequence that see more blocks than they may select."""


def sample(model, batch) -> list[dict[str, torch.Tensor]]:
    for layer in msa_layers(model):
        layer.metrics.reset()
        layer.sample_quality = True
    token_losses(model, *batch).mean().backward()
    return [dict(layer.metrics.sums) for layer in msa_layers(model)]


@pytest.mark.parametrize("phase", [Phase.INDEX_ONLY, Phase.WARMUP, Phase.SPARSE])
def test_a_sampled_step_fills_the_metrics_once_and_resets_itself(phase):
    model = tiny_model()
    set_phase(model, phase)
    batch = random_tokens(BATCH)
    for sums in sample(model, batch):
        assert sums.keys() == {"kl", *QUALITY_NAMES}
        for name in QUALITY_NAMES:
            total, count = sums[name].tolist()
            assert count == BATCH * DROPPING * GROUPS, "only rows that drop blocks count"
            assert 0 < total / count < (torch.tensor(SELECTED).log() if "entropy" in name else 1)
    assert not any(layer.sample_quality for layer in msa_layers(model))

    before = [dict(layer.metrics.sums) for layer in msa_layers(model)]
    token_losses(model, *batch)
    for layer, sums in zip(msa_layers(model), before, strict=True):
        assert all(torch.equal(layer.metrics.sums[name], sums[name]) for name in QUALITY_NAMES)
        assert torch.equal(layer.metrics.sums["kl"], 2 * sums["kl"])


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.SPARSE])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_sample_measures_evenly_spaced_rows_of_the_whole(phase, rows, monkeypatch):
    whole = tiny_model()
    sampled = with_weights_of(whole, tiny_config(msa_quality_rows=rows))
    batch = random_tokens(BATCH)
    per_row = []

    def record(*args, **kwargs):
        per_row.append(selection_quality(*args, **kwargs))
        return per_row[-1]

    selection_quality = self_attention.selection_quality
    monkeypatch.setattr(self_attention, "selection_quality", record)
    for model in (whole, sampled):
        set_phase(model, phase)
    sample(whole, batch)
    measured = sample(sampled, batch)
    total = BATCH * SEQUENCE
    chosen = [(2 * i + 1) * total // (2 * min(rows, total)) for i in range(min(rows, total))]
    for sums, quality in zip(measured, per_row[:2], strict=True):
        dropping = [row for row in chosen if quality.drops_blocks[row]]
        for name in QUALITY_NAMES:
            expected = getattr(quality, name)[dropping]
            torch.testing.assert_close(sums[name][0], expected.sum(), rtol=1e-12, atol=0)
            assert sums[name][1] == expected.numel()


def test_when_nothing_is_dropped_nothing_counts():
    for sums in sample(tiny_model(tiny_config(msa_num_selected_blocks=ALL_BLOCKS)), random_tokens()):
        assert all(sums[name].tolist() == [0, 0] for name in QUALITY_NAMES)


def test_without_a_request_only_the_kl_is_measured():
    model = tiny_model()
    token_losses(model, *random_tokens())
    assert all(layer.metrics.sums.keys() == {"kl"} for layer in msa_layers(model))


def test_a_request_waits_for_a_step_that_trains():
    model = tiny_model()
    for layer in msa_layers(model):
        layer.sample_quality = True
    with torch.no_grad():
        token_losses(model, *random_tokens())
    assert all(layer.sample_quality and not layer.metrics.sums for layer in msa_layers(model))


def test_measuring_changes_no_number_of_the_step():
    model = tiny_model()
    batch = random_tokens()
    expected = token_losses(model, *batch)
    for layer in msa_layers(model):
        layer.sample_quality = True
    assert torch.equal(token_losses(model, *batch), expected)


def test_sums_and_counts_add_up_over_calls_and_skip_masked_rows():
    metrics = LayerMetrics()
    values = torch.tensor([[1.0, 2.0], [float("nan"), float("nan")], [3.0, 4.0]])
    metrics.add_where("recall", values, torch.tensor([True, False, True]))
    metrics.add_where("recall", values, torch.tensor([False, False, True]))
    assert metrics.sums["recall"].tolist() == [17, 6]
    metrics.add("kl", torch.ones(3, 2))
    metrics.add("kl", torch.ones(5, 2))
    assert metrics.sums["kl"].tolist() == [16, 16]
    metrics.reset()
    assert not metrics.sums
