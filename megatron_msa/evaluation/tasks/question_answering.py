"""Questions over supplied documents: one of them holds the answer, the others are in the way.

After RULER (arXiv 2404.06654), which takes them from reading-comprehension sets. Here they come from a file
of JSON lines with "context" (the paragraph), "question" and "answers" (spellings of the answer), so that any
such set serves.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.samples import Question, Sample
from megatron_msa.evaluation.tasks.base import Style


@dataclass(frozen=True)
class Item:
    """A paragraph and a question that it answers."""

    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """A paragraph among paragraphs of other questions, in random order."""

    items: tuple[Item, ...]
    style: Style
    distractors: int
    name: str = "question_answering"
    has_depth: bool = False

    @property
    def most_units(self) -> int:
        """Paragraphs other than the one asked about."""
        return len({item.context for item in self.items}) - 1

    def build(self, units: int, depth: float, rng: random.Random) -> Sample:
        """See `Task.build`; a unit is a paragraph."""
        item = rng.choice(self.items)
        place = rng.random()
        contexts = sorted({other.context for other in self.items} - {item.context})
        rng.shuffle(contexts)
        shown = contexts[:units]
        shown.insert(round(place * len(shown)), item.context)
        documents = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(shown, start=1))
        right = {answer.casefold() for answer in item.answers}
        wrong = sorted({other.answers[0] for other in self.items if other.answers[0].casefold() not in right})
        rng.shuffle(wrong)
        intro = "Answer the question from the given documents with as few words as possible.\n\n"
        if self.style == "completion":
            intro = ""
        question = Question(
            cue=f"\n\nQuestion: {item.question}\nAnswer:",
            answers=item.answers,
            distractors=tuple(wrong[: self.distractors]),
            any_answer=True,
            first_line=self.style == "completion",
        )
        return Sample(intro + documents, (question,))


def read_items(path: Path) -> tuple[Item, ...]:
    """Read the questions of a file.

    Raises:
        ConfigError: the file cannot be read, a line that is no such object, or fewer than two paragraphs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--qa-file {path} cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            context, question, answers = record["context"], record["question"], record["answers"]
            well_formed = isinstance(context, str) and isinstance(question, str) and context and answers
            if not (
                well_formed and isinstance(answers, list) and all(isinstance(a, str) and a for a in answers)
            ):
                raise TypeError(
                    "context and question must be texts, answers a list of texts, none of them empty"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}:{number}: not a question ({error}); a line is {{"context": text, "question": text, '
                '"answers": [text, ...]}'
            ) from error
        items.append(Item(context, question, tuple(answers)))
    if len({item.context for item in items}) < 2:
        raise ConfigError(
            f"--qa-file {path} has fewer than two different paragraphs; there is nothing to choose"
        )
    return tuple(items)
