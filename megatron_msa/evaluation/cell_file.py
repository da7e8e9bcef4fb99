"""The file of finished cells: one JSON object a line, so that an interrupted job goes on where it was.

The first line says under which settings the cells were measured. A job with other settings does not go on
with the file; which cells are asked for is no setting, so a later job may add lengths or tasks.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.plan import Cell

FILE_NAME = "cells.jsonl"


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        header: {"settings": ..., ...}; None for a file without a whole first line.
        results: by cell.
        whole_bytes: length of the whole lines; what follows was cut off while it was written.
    """

    header: dict[str, Any] | None
    results: dict[Cell, dict[str, Any]]
    whole_bytes: int


def read(path: Path) -> Contents:
    """Read a file of cells.

    Raises:
        ConfigError: a line in the middle that is no cell, or a cell that occurs twice.
    """
    data = path.read_bytes()
    whole_bytes = data.rfind(b"\n") + 1
    header: dict[str, Any] | None = None
    results: dict[Cell, dict[str, Any]] = {}
    for number, line in enumerate(data[:whole_bytes].splitlines(), start=1):
        try:
            row = json.loads(line)
            if number == 1:
                header = row
                row["settings"]
                continue
            cell = Cell.from_json(row["cell"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number} is not a line of this program ({error!r}); move the file away"
            ) from error
        if cell in results:
            raise ConfigError(f"{path}:{number} holds {cell} for the second time; delete one of the lines")
        results[cell] = row["result"]
    return Contents(header, results, whole_bytes)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, one line per setting."""
    absent = "not set"
    return [
        f"{name}: {old.get(name, absent)!r} before, {new.get(name, absent)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]


class CellFile:
    """Appends results. A context manager that holds a lock on the file: one job at a time.

    Attributes:
        results: of the cells that are done, those of earlier jobs included.

    Raises:
        ConfigError: another job writes to the file, or it was begun with other settings.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            contents = read(self.path)
            if contents.header is not None:
                changed = differences(contents.header["settings"], header["settings"])
                if changed:
                    raise ConfigError(
                        f"{self.path} was begun with other settings ({'; '.join(changed)}): go on with the "
                        "old ones, or choose another --output"
                    )
            # A job that was killed in the middle of a line leaves the rest of it out; its cell is measured
            # again.
            os.ftruncate(self._file, contents.whole_bytes)
            self.results = contents.results
            if contents.header is None:
                self._append(header)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a finished cell; it is on the disk when this returns."""
        if cell in self.results:
            raise ValueError(f"{cell} is done already")
        self._append({"cell": cell.as_json(), "result": result})
        self.results[cell] = result

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another job is writing to {self.path}; wait for it, or choose another --output"
            ) from error

    def _append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        # One call for the whole line; a partial write (a full disk) raises and is cut off by the next job.
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: the disk took only a part of a line")
        os.fsync(self._file)


def has_begun(folder: Path) -> bool:
    """Whether a job has written to this folder."""
    path = folder / FILE_NAME
    return path.is_file() and read(path).header is not None


def merged(folders: Iterable[Path]) -> tuple[dict[str, Any], dict[Cell, dict[str, Any]]]:
    """The header and the cells of several jobs over one checkpoint.

    Raises:
        ConfigError: a folder without cells, jobs with different settings, or a cell of two jobs.
    """
    header: dict[str, Any] | None = None
    results: dict[Cell, dict[str, Any]] = {}
    first: Path | None = None
    for folder in folders:
        path = folder / FILE_NAME
        if not path.is_file():
            raise ConfigError(f"{folder} has no {FILE_NAME}: its job has not begun, or the folder is wrong")
        contents = read(path)
        if contents.header is None:
            raise ConfigError(f"{path} is empty: its job has not begun")
        if header is None:
            header, first = contents.header, path
        changed = differences(header["settings"], contents.header["settings"])
        if changed:
            raise ConfigError(
                f"{first} and {path} were measured with different settings: {'; '.join(changed)}"
            )
        for cell, result in contents.results.items():
            if cell in results:
                raise ConfigError(f"{path} holds {cell}, which another folder holds too: collect it once")
            results[cell] = result
    if header is None:
        raise ConfigError("no folder to collect")
    return header, results
