"""Which token comes next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.inference.sampling import TorchSampling
from torch import Tensor

from megatron_msa.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. The filters apply in this order: temperature, top_k, top_p.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_k: keep the k most likely tokens; 0 for all.
        top_p: keep the most likely tokens whose probabilities add up to p, in (0, 1]; 1 for all.
        seed: of the draws. One stream serves all sequences of a call, so the same seed gives the same text
            for the same list of prompts.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0. For the most likely token each "
                "time, use greedy decoding"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")


class Sampler:
    """Chooses tokens from logits: the most likely one, or drawn as a `Sampling` says."""

    def __init__(self, sampling: Sampling | None, *, vocab_size: int, device: torch.device) -> None:
        """Of the padded logits only the first ``vocab_size`` can be chosen."""
        self._sampling = sampling
        self._vocab_size = vocab_size
        if sampling is not None:
            if sampling.top_k > vocab_size:
                raise ConfigError(f"top_k is {sampling.top_k} but there are only {vocab_size} tokens")
            self._generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """[n, padded vocabulary] -> int64 [n]."""
        logits = logits[:, : self._vocab_size].float()
        sampling = self._sampling
        if sampling is None:
            return logits.argmax(dim=-1)
        # Megatron's filter takes one of top_k and top_p at a time, and 0 for "all".
        logits = TorchSampling.filter_logits(logits, sampling.temperature, sampling.top_k, 0.0)
        top_p = 0.0 if sampling.top_p == 1 else sampling.top_p
        return TorchSampling.sample_from_logits(logits, 1.0, 0, top_p, generator=self._generator)
