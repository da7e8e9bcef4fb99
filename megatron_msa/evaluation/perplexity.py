"""Loss by position: does a model make use of what lies far back, or does it get worse with the length?"""

from __future__ import annotations

import random
from typing import Any

import torch

from megatron_msa.evaluation.fitting import DoesNotFit
from megatron_msa.evaluation.haystack import Haystack
from megatron_msa.evaluation.protocol import LanguageModel, Tokens

BINS = 16


def texts(haystack: Haystack, tokens: Tokens, *, length: int, samples: int, seed: int) -> list[list[int]]:
    """Stretches of the haystack of exactly ``length`` tokens from random places.

    Raises:
        DoesNotFit: the whole haystack is shorter; repeated text would measure copying.
    """
    found = []
    for number in range(samples):
        start = random.Random(f"{seed}/perplexity/{length}/{number}").random()
        lines = max(1, length // 16)
        while True:
            lines = min(lines, len(haystack.lines))
            ids = tokens.encode("".join(haystack.stretch(start, lines)))
            if len(ids) >= length:
                found.append(ids[:length])
                break
            if lines == len(haystack.lines):
                raise DoesNotFit(
                    f"the haystack {haystack.name} has {len(ids):,} tokens, and perplexity is asked for at "
                    f"{length:,}: give more text with --haystack, or shorter --lengths"
                )
            lines *= 2
    return found


def measure(model: LanguageModel, sequences: list[list[int]]) -> dict[str, Any]:
    """Mean loss in equal bins of the position.

    Args:
        model: scored.
        sequences: token ids, all of one length.

    Returns:
        "bin_ends": the position behind each bin; "loss": nats per token in each bin, the mean over sequences
        (the first token has nothing before it and does not count); "mean_loss" over all tokens.
    """
    length = len(sequences[0])
    losses = -torch.stack([values.double() for values in model.log_probabilities(sequences)])
    ends = sorted({round((n + 1) * length / BINS) for n in range(BINS)} - {0, 1})
    starts = [1, *ends[:-1]]
    loss = [float(losses[:, a - 1 : b - 1].mean()) for a, b in zip(starts, ends, strict=True)]
    return {"bin_ends": ends, "loss": loss, "mean_loss": float(losses.mean()), "sequences": len(sequences)}
