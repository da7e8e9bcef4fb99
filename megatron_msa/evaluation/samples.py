"""One prompt with its question and its right and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about a context.

    Attributes:
        cue: text behind the context that the answer directly continues.
        answers: right answers.
        distractors: wrong answers of the same form, which `log_probability` scoring ranks them against.
        separator: between the cue and the answer, " " or "".
        any_answer: one right answer is enough (several spellings of one); otherwise all are asked for.
        first_line: the reply ends with its first line. For models that would go on with the next thing.
    """

    cue: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...] = ()
    separator: str = " "
    any_answer: bool = False
    first_line: bool = False


@dataclass(frozen=True)
class Sample:
    """A context and the questions about it; its score is the mean over the questions."""

    context: str
    questions: tuple[Question, ...]

    def prompts(self) -> list[str]:
        """One per question."""
        return [self.context + question.cue for question in self.questions]


def expected_reply(question: Question) -> str:
    """All right answers as a model would list them: what room for a reply is measured with."""
    answers: Sequence[str] = question.answers
    if question.any_answer:
        answers = [max(answers, key=len)]
    return question.separator + ", ".join(answers)
