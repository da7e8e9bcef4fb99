"""Needles in a haystack: one, or several of which some are asked for.

After the retrieval tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3): a needle ties a key to a
value; the keys and values are made up, so that nothing but the context can tell the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_msa.data import retrieval
from megatron_msa.evaluation import words
from megatron_msa.evaluation.haystack import Haystack, insert
from megatron_msa.evaluation.samples import Question, Sample
from megatron_msa.evaluation.tasks.base import Style

_NUMBER_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """``keys`` needles with ``values`` values each, of which ``asked`` keys are asked for.

    Args:
        name: of the task.
        haystack: to hide them in.
        style: of the prompt. "completion" uses the needles of `megatron_msa.data.retrieval`, so that a model
            trained on such documents is asked what it has learned, and asks for one key at a time.
        distractors: wrong values per right one, to rank it against. The values of keys that are not asked for
            come first: they are in the context, and the hardest to reject.
    """

    name: str
    haystack: Haystack
    style: Style
    distractors: int
    keys: int = 1
    values: int = 1
    asked: int = 1
    most_units: int | None = None

    @property
    def has_depth(self) -> bool:
        """A single needle is placed; several lie at random depths."""
        return self.keys * self.values == 1

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """See `Task.build`; a unit is a line of the haystack."""
        is_completion = self.style == "completion"
        key_of = (lambda: retrieval.random_key(rng)) if is_completion else (lambda: words.word(rng))
        value_of = (
            (lambda: retrieval.random_value(rng))
            if is_completion
            else (lambda: words.digits(rng, _NUMBER_DIGITS))
        )
        keys = words.distinct(key_of, self.keys)
        num_answers = self.values * (1 if is_completion else self.asked)  # of a question
        num_wrong = self.distractors * num_answers
        values = words.distinct(value_of, self.keys * self.values + num_wrong)
        told = {key: values[n * self.values : (n + 1) * self.values] for n, key in enumerate(keys)}
        unused = values[self.keys * self.values :]
        depths = [depth] if self.has_depth else [rng.random() for _ in range(self.keys * self.values)]
        texts = [self._needle(key, value) for key in keys for value in told[key]]
        lines = self.haystack.stretch(rng.random(), units)
        body = insert(lines, list(zip(depths, texts, strict=True)))

        asked = keys[: self.asked]
        others = [value for key in keys[self.asked :] for value in told[key]]
        if is_completion:
            questions = [
                Question(
                    cue=retrieval.cue(key),
                    answers=tuple(told[key]),
                    distractors=tuple([*(v for k in keys if k != key for v in told[k]), *unused][:num_wrong]),
                    separator="",
                    # A continuation is one value: any of several is right.
                    any_answer=self.values > 1,
                    first_line=True,
                )
                for key in asked
            ]
            return Sample(body, tuple(questions))
        wanted = " and ".join(asked)
        if num_answers == 1:
            asks, says = f"What is the magic number of {wanted}", f"The magic number of {wanted} is"
        else:
            asks, says = f"What are all the magic numbers of {wanted}", f"The magic numbers of {wanted} are"
        question = Question(
            cue=f"\n{asks} that the text above tells? {says}",
            answers=tuple(value for key in asked for value in told[key]),
            distractors=tuple([*others, *unused][:num_wrong]),
        )
        intro = (
            "Magic numbers are hidden in the following text. Remember them: you will be asked for them "
            "afterwards.\n\n"
        )
        return Sample(intro + body, (question,))

    def _needle(self, key: str, value: str) -> str:
        if self.style == "completion":
            return retrieval.needle(key, value)
        return f"One of the magic numbers of {key} is: {value}."
