"""Rows in e4m3: the cache gives what a full forward pass over rounded keys gives, and it costs little."""

import pytest
import torch

from megatron_msa.attention import self_attention
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.paged_rows import E4M3, PagedRows, to_e4m3
from megatron_msa.phases import Phase
from tests.attention.tiny import set_phase
from tests.inference.checks import (
    LENGTHS,
    NEW,
    decoded_logits,
    full_log_probabilities,
    full_logits,
    model_of,
    random_sequences,
)

FORMATS = {
    "index keys": {"index_key_dtype": E4M3},
    "keys and values": {"cache_dtype": E4M3},
    "both": {"index_key_dtype": E4M3, "cache_dtype": E4M3},
}
NORMAL_ERROR = 2**-4
"""Half of the last of three bits behind the leading one, relative to the number."""
SUBNORMAL_ERROR = 2**-10
"""Half of e4m3's smallest step, in units of the scale."""


def test_the_error_of_a_row_is_that_of_its_format():
    rows = torch.randn(50, 3, 16) * torch.logspace(-6, 6, 50)[:, None, None]
    values, scale = to_e4m3(rows)
    found = values.float() * scale[..., None]
    bound = torch.maximum(rows.abs() * NORMAL_ERROR, scale[..., None] * SUBNORMAL_ERROR)
    assert (found - rows).abs().le(bound * (1 + 1e-5)).all()
    # Every row uses the whole range: its largest entry is exact.
    largest = rows.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, largest), rows.gather(-1, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", [0.0, 1e-44, 3e38])
def test_rows_at_the_ends_of_the_range_stay_finite(row):
    values, scale = to_e4m3(torch.full((1, 4), row))
    found = values.float() * scale[:, None]
    assert found.isfinite().all()
    torch.testing.assert_close(found, torch.full((1, 4), row), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, E4M3])
def test_rows_come_back_from_the_places_they_were_written_to(dtype):
    """Pages in any order, written piece by piece; what was not written reads as zeros."""
    device = torch.device("cpu")
    store = PagedRows(7, 2, 4, 8, dtype, device)
    rows = torch.randn(10, 2, 8)
    pages = torch.tensor([5, 1, 3])
    position = torch.arange(10)
    for part in (slice(0, 3), slice(3, 10)):
        store.write(pages[position // 4][part], (position % 4)[part], rows[part])
    found = store.read(pages, 10, torch.float32)
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 0.0, E4M3: NORMAL_ERROR}[dtype]
    torch.testing.assert_close(found, rows, rtol=tolerance, atol=SUBNORMAL_ERROR * 0.02)
    assert store.read(torch.tensor([0, 2, 4, 6]), 16, torch.float32).abs().max() == 0
    assert sum(x.nbytes for x in (store.data, store.scale) if x is not None) == (
        7 * 4 * PagedRows.bytes_per_token(2, 8, dtype)
    )


def round_keys(monkeypatch: pytest.MonkeyPatch, *, index_keys: bool, keys: bool) -> None:
    """Let the training forward pass attend over keys that were in 8 bit."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        values, scale = to_e4m3(x)
        return values.to(x.dtype) * scale[..., None]

    select, attend = self_attention.block_select, self_attention.sparse_attention

    def select_rounded(query, key, *args, **kwargs):
        return select(query, rounded(key) if index_keys else key, *args, **kwargs)

    def attend_rounded(query, key, value, *args, **kwargs):
        if keys:
            key, value = rounded(key), rounded(value)
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(self_attention, "block_select", select_rounded)
    monkeypatch.setattr(self_attention, "sparse_attention", attend_rounded)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("form", FORMATS)
def test_prefill_and_decode_see_the_rounded_keys(form, chunk, monkeypatch):
    """In every chunking: a chunk sees its own keys as the cache keeps them."""
    model = model_of()
    sequences = random_sequences([length + NEW for length in LENGTHS])
    engine = InferenceEngine(model, max_tokens=64, max_sequences=3, prefill_chunk=chunk, **FORMATS[form])
    found = decoded_logits(engine, sequences, NEW, monkeypatch)
    scores = engine.log_probabilities(sequences)
    unrounded = full_logits(model, sequences[0][:-1])[-NEW:]
    round_keys(monkeypatch, index_keys="index" in form or form == "both", keys="index" not in form)
    assert (found[0] - unrounded).abs().max() > 1e-3
    for sequence, actual, score in zip(sequences, found, scores, strict=True):
        expected = full_logits(model, sequence[:-1])[-NEW:]
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
        expected = full_log_probabilities(model, sequence).float()
        torch.testing.assert_close(score, expected, atol=2e-6, rtol=0)


def test_what_eight_bits_cost():
    """Full attention, so that no other block is chosen: log-probabilities move by less than 0.25 nats.

    A random model with heads of 8 numbers is a hard case; docs/inference.md has a trained one.
    """
    model = model_of()
    set_phase(model, Phase.WARMUP)
    sequences = random_sequences([60, 50])
    exact = InferenceEngine(model, max_tokens=64).log_probabilities(sequences)
    rounded = InferenceEngine(model, max_tokens=64, cache_dtype=E4M3).log_probabilities(sequences)
    difference = torch.cat(rounded) - torch.cat(exact)
    assert 0 < difference.abs().mean() < 0.05
    assert difference.abs().max() < 0.25
