"""What every task has in common."""

from __future__ import annotations

import random
from typing import Literal, Protocol

from megatron_msa.evaluation.samples import Sample

Style = Literal["instruct", "completion"]
"""instruct: says what will be asked, for models that follow instructions. completion: only text to go on
with, for small and base models."""


class Task(Protocol):
    """Builds samples of any length."""

    @property
    def name(self) -> str:
        """On the command line and in the results."""
        ...

    @property
    def has_depth(self) -> bool:
        """Whether `build` places its needle at a given depth."""
        ...

    @property
    def most_units(self) -> int | None:
        """Beyond this many units a sample does not grow; None if there is no such limit."""
        ...

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """A sample with ``units`` of filler: lines, words or documents, 0 for what is asked about alone.

        The same arguments (and state of ``rng``) give the same sample, and one unit more changes nothing in
        questions and answers.

        Args:
            units: of filler.
            depth: place of the needle, 0 start to 1 end; without ``has_depth`` not read.
            rng: draws everything else.
        """
        ...
