"""Samples of a given number of tokens: as much filler as fits, and never a token more."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.protocol import Tokens
from megatron_msa.evaluation.samples import Sample, expected_reply
from megatron_msa.evaluation.tasks.base import Task

_CLOSE_ENOUGH = 256
"""A prompt that misses the length by less than 1/256 of it is long enough: each further try tokenizes all of
it."""


class DoesNotFit(ConfigError):
    """Nothing can be measured at this length, whatever the model; other lengths may do."""


@dataclass(frozen=True)
class Fitted:
    """A sample that fits.

    Attributes:
        sample: text.
        prompts: token ids, one prompt per question.
        room: tokens for a reply.
        ran_out: there is no more filler, though at least one unit of it would have fitted.
    """

    sample: Sample
    prompts: list[list[int]]
    room: int
    ran_out: bool = False

    @property
    def tokens(self) -> int:
        """Of the longest prompt and its reply; at most the length asked for."""
        return max(map(len, self.prompts)) + self.room


def fit(task: Task, tokens: Tokens, *, length: int, depth: float, seed: str) -> Fitted:
    """The longest sample of a task whose prompt and reply take at most ``length`` tokens.

    It ends within 1/256 of the length or one unit of filler below it (a line, a word, a paragraph), unless
    it ran out of filler.

    Args:
        task: builds the sample.
        tokens: of the model.
        length: of prompt and reply together, in tokens.
        depth: of the needle.
        seed: everything random follows from it.

    Raises:
        DoesNotFit: the task does not fit even without filler.
    """
    best = _without_filler(task, tokens, length, depth, seed)
    low, high = 0, task.most_units  # low fits; high + 1 does not or does not exist
    bare = best.tokens
    tokens_per_unit = 16.0
    while (high is None or low < high) and length - best.tokens > length // _CLOSE_ENOUGH:
        # Tokens grow almost evenly with the units: aim at the length, but always between the bounds.
        step = max(1, int((length - best.tokens) / tokens_per_unit))
        units = low + step if high is None else min(low + step, high)
        candidate = _build(task, tokens, units, depth, seed)
        if candidate.tokens > best.tokens:
            tokens_per_unit = (candidate.tokens - best.tokens) / (units - low)
        if candidate.tokens <= length:
            low, best = units, candidate
        else:
            high = units - 1
    if low and low == task.most_units:
        missing = length - best.tokens
        if missing > max(length // _CLOSE_ENOUGH, (best.tokens - bare) / low):
            best = replace(best, ran_out=True)
    return best


def check_fits(task: Task, tokens: Tokens, *, length: int, depth: float, seed: str) -> None:
    """Refuse what `fit` would refuse, without any filler: quick at every length.

    Raises:
        DoesNotFit: the task does not fit even without filler.
    """
    _without_filler(task, tokens, length, depth, seed)


def check_filler(task: Task, tokens: Tokens, *, length: int, depth: float, seed: str) -> None:
    """Refuse a length that a task has too little filler for; few tasks have an end of it.

    Raises:
        DoesNotFit: says how long its prompts get.
    """
    if task.most_units is None:
        return
    longest = fit(task, tokens, length=length, depth=depth, seed=seed)
    if longest.ran_out:
        raise DoesNotFit(
            f"the task {task.name} has filler for {longest.tokens:,} tokens, but the length is {length:,}: "
            "give it more (paragraphs in --qa-file), use lengths up to there, or leave the task out"
        )


def _without_filler(task: Task, tokens: Tokens, length: int, depth: float, seed: str) -> Fitted:
    bare = _build(task, tokens, 0, depth, seed)
    if bare.tokens > length:
        raise DoesNotFit(
            f"the task {task.name} takes {bare.tokens:,} tokens without any filler ({bare.room:,} of them "
            f"for the reply), but the length is {length:,}: use lengths from there on, or leave the task out"
        )
    return bare


def _build(task: Task, tokens: Tokens, units: int, depth: float, seed: str) -> Fitted:
    sample = task.build(units, depth, random.Random(seed))
    prompts = [tokens.encode(prompt) for prompt in sample.prompts()]
    # A reply may be wordier than the bare answers, but not much: the length belongs to the context.
    room = max(2 * len(tokens.encode(expected_reply(question))) + 8 for question in sample.questions)
    return Fitted(sample, prompts, room)
