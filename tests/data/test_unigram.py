"""The unigram baseline."""

import math

import numpy as np
import pytest

from megatron_msa.data import unigram
from megatron_msa.data.unigram import token_counts, unigram_cross_entropy


def test_the_loss_is_the_mean_negative_log_of_the_smoothed_probability():
    # p = 4/8, 2/8, 1/8, 1/8 after adding one to each count.
    loss = unigram_cross_entropy([3, 1, 0, 0], [2, 1, 0, 1])
    assert loss == pytest.approx((2 * math.log(2) + math.log(4) + math.log(8)) / 4)


def test_without_training_data_the_loss_is_that_of_guessing():
    assert unigram_cross_entropy(np.zeros(50), np.ones(50)) == pytest.approx(math.log(50))


def test_a_token_that_the_training_data_lacks_costs_a_finite_loss():
    assert unigram_cross_entropy([1000, 0], [0, 1]) == pytest.approx(math.log(1002))


def test_on_its_own_data_the_loss_approaches_the_entropy():
    counts = np.array([700_000, 200_000, 100_000])
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert unigram_cross_entropy(counts, counts) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_tokens_are_counted_in_any_integer_type_and_shape(dtype):
    counts = token_counts(np.array([[0, 3, 3], [1, 3, 0]], dtype=dtype), 5)
    assert counts.tolist() == [2, 1, 0, 3, 0]


def test_counting_in_chunks_changes_nothing(monkeypatch):
    monkeypatch.setattr(unigram, "_CHUNK", 7)
    tokens = np.random.default_rng(0).integers(0, 11, size=100)
    assert token_counts(tokens, 11).tolist() == [int((tokens == token).sum()) for token in range(11)]


def test_no_tokens_are_counted_as_zeros():
    assert token_counts([], 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match="allowed: 0 to 4"):
        token_counts([0, token], 5)


def test_fractional_token_ids_are_refused():
    with pytest.raises(TypeError, match="float64"):
        token_counts([0.5], 5)


def test_counts_over_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="one vocabulary"):
        unigram_cross_entropy([1, 2], [1, 2, 3])


def test_empty_validation_data_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        unigram_cross_entropy([1, 2], [0, 0])
