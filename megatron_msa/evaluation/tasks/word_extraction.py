"""Aggregation over the whole context: the words that occur most often.

After RULER (arXiv 2404.06654): common words in a numbered list with two frequencies, and frequent words of a
coded text whose frequencies fall as a zeta distribution. There is no haystack: all of the context counts.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass

from megatron_msa.evaluation import words
from megatron_msa.evaluation.samples import Question, Sample
from megatron_msa.evaluation.tasks.base import Style


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """Ten words that occur 30 times each in a shuffled list where all others occur 3 times."""

    style: Style
    distractors: int
    common: int = 10
    common_times: int = 30
    uncommon_times: int = 3
    name: str = "common_words"
    has_depth: bool = False
    most_units: int | None = None

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """See `Task.build`; a unit is an uncommon word."""
        first = words.distinct(lambda: words.word(rng), self.common * (1 + self.distractors))
        common, others = first[: self.common], first[self.common :]
        # At least the distractors are in the list, otherwise nobody could confuse them with an answer.
        rest = words.distinct(lambda: words.word(rng), units, taken=set(first))
        uncommon = [*others, *rest]
        listed = common * self.common_times + uncommon * self.uncommon_times
        rng.shuffle(listed)
        numbered = " ".join(f"{number}. {each}" for number, each in enumerate(listed, start=1))
        intro, question = "", ""
        if self.style == "instruct":
            intro = (
                "Below is a numbered list of words. Some of them occur more often than others. Remember "
                "those that occur most often.\n\n"
            )
            question = f"Question: which {self.common} words are the most common ones in the list?\nAnswer: "
        cue = f"\n{question}The {self.common} words that occur most often in the list are:"
        return Sample(
            intro + numbered, (Question(cue=cue, answers=tuple(common), distractors=tuple(others)),)
        )


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """The three most frequent words of a coded text; "..." is more frequent than all of them and does not
    count.

    Word k of N has a frequency of k^-2 / zeta(2), rounded down: the counts are exact, not sampled.
    """

    style: Style
    distractors: int
    asked: int = 3
    vocabulary: int = 2000
    word_letters: int = 6
    smallest_text: int = 150
    """Words without any filler: enough for the counts of the first five to differ."""
    name: str = "frequent_words"
    has_depth: bool = False
    most_units: int | None = None

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """See `Task.build`; a unit is a word of the text."""
        coded = words.distinct(
            lambda: words.letters(rng, self.word_letters, string.ascii_lowercase), self.vocabulary
        )
        coded[0] = "..."
        total = self.smallest_text + units
        zeta_of_two = math.pi**2 / 6
        text: list[str] = []
        for rank, each in enumerate(coded, start=1):
            text += [each] * int(total / (zeta_of_two * rank**2))
        rng.shuffle(text)
        answers = coded[1 : 1 + self.asked]
        others = coded[1 + self.asked : 1 + self.asked * (1 + self.distractors)]
        intro, question = "", ""
        if self.style == "instruct":
            intro = (
                "The following text is coded. Keep track of how often each coded word occurs. The dots '...' "
                "do not count.\n\n"
            )
            question = f"Question: which {self.asked} coded words are the most frequent ones?\nAnswer: "
        cue = f"\n{question}The {self.asked} most frequent words of the text above are:"
        return Sample(
            intro + " ".join(text), (Question(cue=cue, answers=tuple(answers), distractors=tuple(others)),)
        )
