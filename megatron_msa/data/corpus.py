"""Where documents come from: JSONL, plain text files and directories, and the built-in corpus.

The built-in corpus is the source code of the running Python's standard library: about 10 MB of real text that
is on every machine, so that a first run needs no download. It is the same from run to run with one Python
version, not between versions.
"""

import glob
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_msa.errors import ConfigError

JSON_SUFFIXES = (".jsonl", ".json")

# Left out of the built-in corpus: tests, installed packages, and files that are tables rather than text.
_EXCLUDED_DIRECTORIES = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
# `_sysconfigdata*` and `config-*` are written when Python is built, and name that machine's paths.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One document. `name` says where it is from, `source_bytes` how many input bytes it took (for
    progress)."""

    name: str
    text: str
    source_bytes: int


def builtin_files() -> list[Path]:
    """The files of the built-in corpus, sorted by their path inside the standard library."""
    root = Path(sysconfig.get_path("stdlib"))

    def included(file: Path) -> bool:
        parts = file.relative_to(root).parts
        return not any(part in _EXCLUDED_DIRECTORIES or part.startswith(_EXCLUDED_PREFIXES) for part in parts)

    files = [file for file in root.rglob("*.py") if included(file)]
    if not files:
        raise ConfigError(
            f"the built-in corpus is empty: no Python source under {root}. This Python was installed without "
            "its library sources; give text of your own with --input."
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def list_input_files(inputs: Sequence[str], pattern: str = "**/*") -> list[Path]:
    """Resolve files, directories and globs to a list of files, in the order given, each once.

    Args:
        inputs: paths or globs (`data/*.jsonl`).
        pattern: which files of a directory to take, as a glob inside it; hidden files are never taken.

    Raises:
        ConfigError: nothing given, a path that does not exist, or a glob or directory without a file.
    """
    if not inputs:
        raise ConfigError(
            "no input given: pass --input with files, directories or globs, or --builtin-corpus."
        )
    files: list[Path] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            found = sorted(
                file
                for file in path.glob(pattern)
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not found:
                raise ConfigError(f"no file in directory {item} matches --glob {pattern!r}.")
        elif path.exists():
            found = [path]
        elif glob.has_magic(item):
            found = [
                Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()
            ]
            if not found:
                raise ConfigError(f"no file matches the input pattern {item!r}.")
        else:
            raise ConfigError(f"input {item} does not exist: pass a file, a directory or a glob.")
        files.extend(found)
    return list(dict.fromkeys(files))


def iter_documents(files: Iterable[Path], json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of `files`: each line of a .jsonl or .json file, or a plain text file as a
    whole."""
    for file in files:
        if file.suffix in JSON_SUFFIXES:
            yield from _iter_json_lines(file, json_key)
        else:
            yield _read_text(file)


def take_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Yield documents until their text reaches `max_bytes` bytes of UTF-8; the last one is cut to fit."""
    if max_bytes is not None and max_bytes <= 0:
        raise ConfigError(f"max_bytes is {max_bytes}; it must be at least 1 byte, or None for no limit.")
    remaining = max_bytes
    for document in documents:
        if remaining is None:
            yield document
            continue
        data = document.text.encode("utf-8")
        if len(data) > remaining:
            # errors="ignore" drops the character that the cut falls into.
            text = data[:remaining].decode("utf-8", errors="ignore")
            document = Document(document.name, text, len(text.encode("utf-8")))
        yield document
        remaining -= len(data)
        if remaining <= 0:
            return


def _read_text(file: Path) -> Document:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 text ({error}). Convert it, or leave it out with a narrower --input or "
            "--glob."
        ) from error
    return Document(str(file), text, len(data))


def _iter_json_lines(file: Path, json_key: str) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                raise ConfigError(
                    f"{where}: not valid JSON ({error}). Each line must hold one JSON object."
                ) from error
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{where}: a JSON {type(record).__name__}; each line must hold one JSON object."
                )
            if json_key not in record:
                raise ConfigError(
                    f"{where}: no key {json_key!r}; its keys are {sorted(record)}. Name the text with "
                    "--json-key."
                )
            text = record[json_key]
            if not isinstance(text, str):
                raise ConfigError(
                    f"{where}: {json_key!r} holds a {type(text).__name__}; it must be a string."
                )
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
                raise ConfigError(f"{where}: {json_key!r} is not valid Unicode ({error}).") from error
            yield Document(where, text, len(line))
