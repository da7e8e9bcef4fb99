"""Drawn tokens follow the filtered distribution, and the seed decides which."""

import pytest
import torch

from megatron_msa.errors import ConfigError
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.sampling import Sampler, Sampling
from tests.inference.checks import model_of, random_sequences

PROBABILITIES = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
DRAWS = 20_000


def frequencies(sampling: Sampling) -> torch.Tensor:
    sampler = Sampler(sampling, vocab_size=5, device=torch.device("cpu"))
    # Two more columns that pad the vocabulary, the most likely of all.
    padded = torch.cat([PROBABILITIES.log(), torch.tensor([9.0, 9.0])]).expand(DRAWS, -1)
    return torch.bincount(sampler(padded), minlength=7) / DRAWS


def filtered(keep: int, temperature: float = 1.0) -> torch.Tensor:
    kept = PROBABILITIES.clone().pow(1 / temperature)
    kept[keep:] = 0
    return torch.cat([kept / kept.sum(), torch.zeros(2)])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), filtered(5)),
        (Sampling(temperature=0.5), filtered(5, 0.5)),
        (Sampling(top_k=2), filtered(2)),
        (Sampling(top_p=0.65), filtered(2)),
        (Sampling(top_p=0.75), filtered(3)),
        (Sampling(top_k=4, top_p=0.9), filtered(3)),
        (Sampling(temperature=0.5, top_k=3), filtered(3, 0.5)),
        (Sampling(top_p=1e-6), filtered(1)),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, expected):
    """Within five standard deviations, and never outside of what is kept."""
    found = frequencies(sampling)
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert (found - expected).abs().le(5 * deviation).all()


def test_without_sampling_the_most_likely_token_is_chosen():
    sampler = Sampler(None, vocab_size=5, device=torch.device("cpu"))
    assert sampler(torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0, 9.0, 9.0]])).tolist() == [1]


def test_the_seed_decides():
    model = model_of()
    engine = InferenceEngine(model, max_tokens=64, max_sequences=2)
    prompts = random_sequences([10, 4])

    def drawn(seed: int) -> list[list[int]]:
        return engine.generate(prompts, max_new_tokens=12, sampling=Sampling(seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)
    greedy = engine.generate(prompts, max_new_tokens=12)
    assert engine.generate(prompts, max_new_tokens=12, sampling=Sampling(top_k=1)) == greedy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_more_candidates_than_tokens_are_refused():
    with pytest.raises(ConfigError, match="top_k is 6 but there are only 5 tokens"):
        frequencies(Sampling(top_k=6))
