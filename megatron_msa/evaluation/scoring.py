"""Scores of replies and of rankings, each between 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_msa.evaluation.samples import Question

GENERATION = "generation"
LOG_PROBABILITY = "log_probability"
METHODS = (GENERATION, LOG_PROBABILITY)


def score_reply(question: Question, reply: str) -> float:
    """Share of the right answers that the reply holds; with ``any_answer`` 1 if it holds one of them.

    An answer counts where it stands as a whole word or number, in any case: "123" is not in "41234". (RULER
    counts any substring.)
    """
    if question.first_line:
        reply = reply.split("\n", 1)[0]
    found = [_holds(reply, answer) for answer in question.answers]
    if question.any_answer:
        return float(any(found))
    return sum(found) / len(found)


def score_ranking(question: Question, answers: Sequence[float], distractors: Sequence[float]) -> float:
    """Share of the right answers among as many top-ranked candidates; with ``any_answer`` whether the best is
    one.

    Args:
        question: asked.
        answers: log-probability of each right answer.
        distractors: of each wrong one. An answer that only equals a wrong one has not been found.
    """
    if question.any_answer:
        return float(not distractors or max(answers) > max(distractors))
    ranked = sorted([(-value, 1) for value in answers] + [(-value, 0) for value in distractors])
    return sum(right for _, right in ranked[: len(answers)]) / len(answers)


def chance(question: Question) -> float:
    """What `score_ranking` is on average if all candidates are equally likely."""
    right, wrong = len(question.answers), len(question.distractors)
    return right / (right + wrong)


def _holds(reply: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) is not None
