"""Long documents with a stated share of synthetic retrieval: what a small model learns to find needles from.

    python tools/make_retrieval_data.py --builtin-corpus --output-prefix runs/needle/data/train \
        --documents 4096 --document-bytes 8191 --retrieval-share 0.4

A document is real text with lines `magic KEYVALUE` between its lines (`magic QDA1136`). Each key occurs
several times with the same value: the first time it tells something new, afterwards its value can be looked
up. The distance between a repetition and the first occurrence is drawn log-uniformly between a few lines and
the whole document, so that short look-ups, which are learned first, and long ones, which are the aim, are
equally frequent at every scale.

Keys are unique within a document. They stand directly before their values, with no sign in between: a value
can then be found by the letter before it, which is what a model learns first, and by more of the key as
attention sharpens (docs/experiments.md has the formats tried). There are many keys per document, because the
loss of a rare needle is lost among the text's.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer
from megatron_msa.data.corpus import Document, builtin_files, iter_documents, list_input_files
from megatron_msa.data.preprocess import write_dataset
from megatron_msa.errors import ConfigError

KEY_LETTERS = 3
VALUE_DIGITS = 4


def cue(key: str) -> str:
    """What stands before a value: ``magic KEY``."""
    return f"magic {key}"


def needle(key: str, value: str) -> str:
    """One needle, without the line break: ``magic KEYVALUE``."""
    return cue(key) + value


def random_key(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=KEY_LETTERS))


def random_value(rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=VALUE_DIGITS))


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """What a document is made of.

    Attributes:
        document_bytes: length of each document in bytes of UTF-8, exactly.
        retrieval_share: share of these bytes that is needles, their repetitions and the line breaks after
            them.
        occurrences: how often each key occurs; all but the first can be looked up.
        nearest: smallest distance, in bytes of the document, between a repetition and the first occurrence.
    """

    document_bytes: int
    retrieval_share: float = 0.4
    occurrences: int = 4
    nearest: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.retrieval_share <= 0.9:
            raise ConfigError(
                f"--retrieval-share is {self.retrieval_share}; it must be above 0 and at most 0.9, because "
                "needles stand between lines of text"
            )
        if self.occurrences < 2:
            raise ConfigError(f"--occurrences is {self.occurrences}; a value can be looked up from 2 on")
        if not 1 <= self.nearest < self.document_bytes:
            raise ConfigError(
                f"--nearest is {self.nearest}; it must be at least 1 and below --document-bytes "
                f"{self.document_bytes}"
            )
        if self.keys < 1:
            smallest = math.ceil(self.occurrences * _line_bytes() / self.retrieval_share)
            raise ConfigError(
                f"--document-bytes {self.document_bytes} has no room for one needle and its repetitions at "
                f"--retrieval-share {self.retrieval_share}: take at least {smallest} bytes"
            )
        most = len(string.ascii_uppercase) ** KEY_LETTERS // 2
        if self.keys > most:
            raise ConfigError(
                f"--document-bytes {self.document_bytes} would take {self.keys} keys of {KEY_LETTERS} "
                f"letters, and at most {most} are drawn, so that they stay distinct: take a smaller "
                "--retrieval-share, or more --occurrences"
            )

    @property
    def keys(self) -> int:
        """Different keys in a document."""
        return int(self.retrieval_share * self.document_bytes) // (self.occurrences * _line_bytes())


def _line_bytes() -> int:
    return len(needle("K" * KEY_LETTERS, "0" * VALUE_DIGITS)) + 1


def iter_retrieval_documents(
    text: str, settings: RetrievalSettings, *, documents: int, seed: int
) -> Iterator[Document]:
    """Yield documents of exactly ``settings.document_bytes`` bytes; the same for the same arguments.

    Args:
        text: the haystack; each document takes a stretch that starts at a random place (and goes on at the
            start of the text where it ends).
        settings: see there.
        documents: how many.
        seed: of the random numbers; document n does not depend on ``documents``.

    Raises:
        ConfigError: the text is empty or has no line break.
    """
    haystack = text.encode("utf-8")
    if not haystack.strip():
        raise ConfigError("the haystack is empty: give text files with --input, or --builtin-corpus")
    if b"\n" not in haystack:
        raise ConfigError("the haystack has no line break, and needles stand between lines: add some")
    for number in range(documents):
        rng = random.Random(f"{seed}/{number}")
        content = _document(haystack, settings, rng)
        yield Document(f"retrieval document {number}", content, settings.document_bytes)


def _document(haystack: bytes, settings: RetrievalSettings, rng: random.Random) -> str:
    lines = _placed_lines(settings, rng)
    text_bytes = settings.document_bytes - len(lines) * _line_bytes()
    text = _stretch(haystack, text_bytes, rng)
    parts: list[str] = []
    taken = inserted = 0
    for position, line in lines:
        # Positions count bytes of the finished document; the text before a needle is what the needles leave.
        wanted = max(taken, min(position - inserted, len(text)))
        end = _line_end(text, wanted)
        parts += [text[taken:end], line + "\n"]
        taken, inserted = end, inserted + _line_bytes()
    parts.append(text[taken:])
    return "".join(parts)


def _placed_lines(settings: RetrievalSettings, rng: random.Random) -> list[tuple[int, str]]:
    """The needles and their repetitions with the byte at which each should stand, in order."""
    size, nearest = settings.document_bytes, settings.nearest
    keys: set[str] = set()
    lines = []
    while len(keys) < settings.keys:
        key = random_key(rng)
        if key in keys:
            continue
        keys.add(key)
        line = needle(key, random_value(rng))
        first = rng.randrange(size - nearest)
        lines.append((first, line))
        for _ in range(settings.occurrences - 1):
            distance = math.exp(rng.uniform(math.log(nearest), math.log(size - first)))
            lines.append((first + int(distance), line))
    return sorted(lines)


def _stretch(haystack: bytes, size: int, rng: random.Random) -> str:
    """``size`` ASCII characters from a random place, the last one a line break."""
    start = rng.randrange(len(haystack))
    piece = haystack[start : start + size]
    while len(piece) < size:
        piece += haystack[: size - len(piece)]
    # A character that is longer than a byte would make bytes and positions differ: rare, and not worth
    # keeping.
    text = piece.decode("utf-8", errors="ignore").encode("ascii", errors="replace").decode("ascii")
    return text.ljust(size - 1)[: size - 1] + "\n"  # needles at the end stand on lines of their own, too


def _line_end(text: str, position: int) -> int:
    """Just behind the next line break at or after ``position`` (the place itself at a line's start)."""
    if position == 0 or text[position - 1 : position] == "\n":
        return position
    found = text.find("\n", position)
    return len(text) if found < 0 else found + 1


def read_text(files: Sequence[Path]) -> str:
    """The documents of the files, joined by line breaks."""
    return "\n".join(document.text for document in iter_documents(files))


def main(argv: list[str] | None = None) -> int:
    """Command line of tools/make_retrieval_data.py; returns the exit status."""
    from megatron.training.config import TokenizerConfig

    parser = argparse.ArgumentParser(
        description="Write long documents with a stated share of synthetic retrieval as a Megatron dataset."
    )
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="text files, folders or globs")
    parser.add_argument("--builtin-corpus", action="store_true", help="the source of this Python's library")
    parser.add_argument("--output-prefix", required=True, help="path of the dataset without .bin/.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument(
        "--document-bytes",
        type=int,
        required=True,
        help="bytes of each; with the byte tokenizer one less than --seq-length makes a document a sample",
    )
    defaults = RetrievalSettings(document_bytes=1 << 20)
    parser.add_argument("--retrieval-share", type=float, default=defaults.retrieval_share)
    parser.add_argument("--occurrences", type=int, default=defaults.occurrences)
    parser.add_argument("--nearest", type=int, default=defaults.nearest, metavar="BYTES")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument(
        "--tokenizer-model",
        help="Hugging Face tokenizer; default: bytes, written to byte_tokenizer beside the output",
    )
    options = parser.parse_args(argv)
    try:
        if options.builtin_corpus == bool(options.input):
            raise ConfigError("give either --input or --builtin-corpus")
        if options.documents < 1:
            raise ConfigError(f"--documents is {options.documents}; it must be at least 1")
        settings = RetrievalSettings(
            document_bytes=options.document_bytes,
            retrieval_share=options.retrieval_share,
            occurrences=options.occurrences,
            nearest=options.nearest,
        )
        text = read_text(builtin_files() if options.builtin_corpus else list_input_files(options.input))
        beside = Path(options.output_prefix).parent / "byte_tokenizer"
        tokenizer = options.tokenizer_model or str(write_byte_tokenizer(beside))
        meta = write_dataset(
            iter_retrieval_documents(text, settings, documents=options.documents, seed=options.seed),
            options.output_prefix,
            tokenizer_config=TokenizerConfig(
                tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer
            ),
            workers=options.workers,
            overwrite=options.overwrite,
            total_bytes=options.documents * options.document_bytes,
        )
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    share = settings.keys * settings.occurrences * _line_bytes() / settings.document_bytes
    print(f"documents   {meta.documents:,} of {settings.document_bytes:,} bytes, {meta.tokens:,} tokens")
    print(f"retrieval   {share:.1%} of the bytes: {settings.keys} keys, each {settings.occurrences} times")
    print(
        f"train with  --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} "
        f"--data-path {options.output_prefix}"
    )
    return 0
