"""Real text to hide things in, as lines that are taken from a random place on."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_msa.data.corpus import builtin_files, iter_documents, list_input_files
from megatron_msa.errors import ConfigError

_LONG_LINE = 240  # characters: prose has paragraphs in a line, and depths need places to insert at
_SENTENCE_END = re.compile(r"(?<=[.!?]) +")


@dataclass(frozen=True)
class Haystack:
    """Lines of text, none of them empty, each with its line break.

    Attributes:
        lines: in the order of the files. Long lines are cut at the ends of sentences.
        name: for reports.
    """

    lines: tuple[str, ...]
    name: str

    @property
    def fingerprint(self) -> str:
        """A hash of the text: results with different haystacks do not belong into one table."""
        return hashlib.sha256("".join(self.lines).encode()).hexdigest()[:16]

    def stretch(self, start: float, count: int) -> list[str]:
        """``count`` lines from the share ``start`` of the text on, from the beginning again where it ends."""
        first = int(start * len(self.lines))
        return [self.lines[(first + n) % len(self.lines)] for n in range(count)]


def read_haystack(paths: Sequence[str] | None) -> Haystack:
    """Read text files (.jsonl: key "text"); None for the built-in corpus, the source of Python's library.

    Raises:
        ConfigError: no such file, a file that is not text, or no text in them.
    """
    if paths is None:
        return from_texts((each.text for each in iter_documents(builtin_files())), "Python's library")
    files = list_input_files(paths)
    return from_texts((each.text for each in iter_documents(files)), ", ".join(map(str, paths)))


def from_texts(texts: Iterable[str], name: str) -> Haystack:
    """A haystack of texts that are in memory.

    Raises:
        ConfigError: no text in them.
    """
    lines = []
    for text in texts:
        for line in text.splitlines():
            parts = _SENTENCE_END.split(line) if len(line) > _LONG_LINE else [line]
            lines += [part.rstrip() + "\n" for part in parts if part.strip()]
    if not lines:
        raise ConfigError(
            f"the haystack is empty: {name} holds no text. Give --haystack files or folders with text, or "
            "leave it out for the built-in corpus"
        )
    return Haystack(tuple(lines), name)


def insert(lines: Sequence[str], pieces: Sequence[tuple[float, str]]) -> str:
    """The lines joined, with each piece on a line of its own at its depth.

    Args:
        lines: each with its line break.
        pieces: (depth, text); depth 0 stands before the first line, 1 behind the last one, in between at the
            line break that is nearest to this share of the characters. Equal places keep their order.
    """
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    at: dict[int, list[str]] = {}
    for depth, text in pieces:
        wanted = depth * ends[-1]
        place = bisect_left(ends, wanted)
        if place and ends[place] - wanted > wanted - ends[place - 1]:
            place -= 1
        at.setdefault(place, []).append(text + "\n")
    parts = []
    for number in range(len(lines) + 1):
        parts += at.get(number, [])
        if number < len(lines):
            parts.append(lines[number])
    return "".join(parts)
