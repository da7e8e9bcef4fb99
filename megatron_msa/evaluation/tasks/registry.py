"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.haystack import Haystack
from megatron_msa.evaluation.tasks.base import Style, Task
from megatron_msa.evaluation.tasks.needles import NeedleTask
from megatron_msa.evaluation.tasks.question_answering import Item, QuestionAnswering
from megatron_msa.evaluation.tasks.variable_tracking import VariableTracking
from megatron_msa.evaluation.tasks.word_extraction import CommonWords, FrequentWords


@dataclass(frozen=True, kw_only=True)
class Material:
    """What tasks are made of.

    Attributes:
        haystack: text to hide things in.
        style: of the prompts.
        distractors: wrong answers per right one.
        items: of the question file; None without one.
    """

    haystack: Haystack
    style: Style
    distractors: int
    items: tuple[Item, ...] | None = None


def _needles(name: str, material: Material, **counts: int) -> Task:
    return NeedleTask(
        name=name,
        haystack=material.haystack,
        style=material.style,
        distractors=material.distractors,
        **counts,
    )


def _variables(name: str, material: Material) -> Task:
    return VariableTracking(
        haystack=material.haystack, style=material.style, distractors=material.distractors
    )


def _common(name: str, material: Material) -> Task:
    return CommonWords(style=material.style, distractors=material.distractors)


def _frequent(name: str, material: Material) -> Task:
    return FrequentWords(style=material.style, distractors=material.distractors)


def _questions(name: str, material: Material) -> Task:
    if material.items is None:
        raise ConfigError(f"the task {name} needs --qa-file: questions, their paragraphs and answers")
    return QuestionAnswering(items=material.items, style=material.style, distractors=material.distractors)


_TASKS: dict[str, Callable[[str, Material], Task]] = {
    "needle": _needles,
    "multi_key": partial(_needles, keys=4),
    "multi_value": partial(_needles, values=4),
    "multi_query": partial(_needles, keys=4, asked=4),
    "variable_tracking": _variables,
    "common_words": _common,
    "frequent_words": _frequent,
    "question_answering": _questions,
}

TASK_NAMES: Sequence[str] = tuple(_TASKS)
"""Tasks with questions and answers."""


def make_task(name: str, material: Material) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none, or it lacks its material.
    """
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}; there are {', '.join(TASK_NAMES)}")
    return _TASKS[name](name, material)
