"""Variable tracking: which variables have a value that was handed on from one to the next.

After RULER (arXiv 2404.06654): `VAR A = 12345`, further on `VAR B = VAR A`, and so on; the question asks for
all variables with the value.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_msa.evaluation import words
from megatron_msa.evaluation.haystack import Haystack, insert
from megatron_msa.evaluation.samples import Question, Sample
from megatron_msa.evaluation.tasks.base import Style

_NAME_LETTERS = 5
_VALUE_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """One chain of ``hops`` assignments behind the first, in order, at random depths of the haystack."""

    haystack: Haystack
    style: Style
    distractors: int
    hops: int = 4
    name: str = "variable_tracking"
    has_depth: bool = False
    most_units: int | None = None

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """See `Task.build`; a unit is a line of the haystack."""
        names = words.distinct(
            lambda: words.letters(rng, _NAME_LETTERS), (self.hops + 1) * (1 + self.distractors)
        )
        chain, others = names[: self.hops + 1], names[self.hops + 1 :]
        value = words.digits(rng, _VALUE_DIGITS)
        sources = [value, *(f"VAR {name}" for name in chain)]
        texts = [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
        depths = sorted(rng.random() for _ in texts)
        body = insert(self.haystack.stretch(rng.random(), units), list(zip(depths, texts, strict=True)))
        told = f"{len(chain)} variables have the value {value}, directly or handed on by another. They are:"
        cue = f"\n{told}"
        if self.style == "instruct":
            body = (
                "Variables are assigned in the following text, some of them the value of another one. Keep "
                f"track of them.\n\n{body}"
            )
            cue = f"\nQuestion: which variables have the value {value} in the text above?\nAnswer: {told}"
        return Sample(body, (Question(cue=cue, answers=tuple(chain), distractors=tuple(others)),))
