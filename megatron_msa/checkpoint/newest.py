"""The newest checkpoint of a run whose files are all there and long enough.

Megatron moves its pointer (``latest_checkpointed_iteration.txt``) after a checkpoint is written, so a process
that dies while saving does no harm. Files that are lost or cut short later (a full disk, a file system that
was not synced) are found here, before hundreds of processes start: the metadata says which bytes of which
file hold what. Bytes that have changed are not found; for these Megatron has --verify-integrity.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_msa.errors import ConfigError

_TRACKER = "latest_checkpointed_iteration.txt"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a torch_dist checkpoint, or None.

    Args:
        checkpoint: folder of one iteration.
    """
    from torch.distributed.checkpoint import FileSystemReader

    try:
        json.loads((checkpoint / "metadata.json").read_bytes())
    except FileNotFoundError:
        return "metadata.json is missing"
    except ValueError:
        return "metadata.json cannot be read"
    try:
        metadata: Any = FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # whatever unpickling a damaged file raises
        return f".metadata cannot be read ({type(error).__name__})"
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) < end:
            return f"{name} has {size:,} bytes of {end:,}"
    return None


def saved_iterations(folder: Path) -> list[int]:
    """Iterations that have a folder in --save of a run, newest first; complete or not."""
    names = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.iterdir())
    return sorted((int(name[1]) for name in names if name), reverse=True)


def newest_complete(folder: Path) -> tuple[int | None, list[str]]:
    """The iteration to load, and what is wrong with those that are newer.

    Args:
        folder: --save of a run; it need not exist.

    Returns:
        The newest iteration, not beyond Megatron's pointer, that is complete; None if there is no pointer or
        it names a converted checkpoint. And one line per damaged checkpoint that was passed over.

    Raises:
        ConfigError: there are checkpoints, but none is complete.
    """
    tracker = folder / _TRACKER
    if not tracker.is_file() or (text := tracker.read_text().strip()) == "release":
        return None, []
    iterations = saved_iterations(folder)
    if not text.isdecimal():
        complete = (each for each in iterations if damage(folder / f"iter_{each:07d}") is None)
        newest = next(complete, None)
        advice = "there is no complete checkpoint" if newest is None else f"write {newest} there"
        raise ConfigError(
            f"{tracker} holds {text!r} where an iteration is expected; {advice} (Megatron would end "
            "without an error)"
        )
    iterations = [iteration for iteration in iterations if iteration <= int(text)]
    skipped: list[str] = []
    for iteration in iterations:
        problem = damage(folder / f"iter_{iteration:07d}")
        if problem is None:
            return iteration, skipped
        skipped.append(f"the checkpoint of iteration {iteration} is damaged: {problem}")
    raise ConfigError(
        f"{folder} has no complete checkpoint up to iteration {text} ({'; '.join(skipped) or 'none there'}); "
        "restore one, or start in another folder"
    )
