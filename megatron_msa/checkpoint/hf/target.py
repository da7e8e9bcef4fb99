"""A target folder that appears at once, complete, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_msa.errors import ConfigError

_SPARE = 64 * 2**20
"""Bytes for headers, metadata, configuration and tokenizer files."""


@contextlib.contextmanager
def new_folder(target: Path, *, expected_bytes: int) -> Iterator[Path]:
    """A folder to write into; at the end it is renamed to ``target``, after an error it is removed.

    A process that is killed leaves ``.NAME.incomplete`` behind, which the next run removes.

    Args:
        target: must not exist.
        expected_bytes: size of the tensors to be written.

    Raises:
        ConfigError: the target exists, another process is writing it, or the disk is too small.
    """
    target = target.absolute()
    if target.exists():
        raise ConfigError(f"--save {target} exists; choose another folder or remove it")
    folder = target.parent / f".{target.name}.incomplete"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target):
        shutil.rmtree(folder, ignore_errors=True)
        needed, free = expected_bytes + _SPARE, shutil.disk_usage(target.parent).free
        if needed > free:
            raise ConfigError(
                f"--save {target} needs about {needed / 2**30:.1f} GiB, "
                f"its disk has {free / 2**30:.1f} GiB free"
            )
        folder.mkdir()
        try:
            yield folder
            _sync(folder)
            folder.rename(target)
            _sync(target.parent, recursive=False)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Two conversions to one target would remove each other's files."""
    lock = target.parent / f".{target.name}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is writing {target}; wait for it or end it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _sync(folder: Path, *, recursive: bool = True) -> None:
    """A rename must not reach the disk before what is renamed."""
    paths = [folder, *folder.rglob("*")] if recursive else [folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
