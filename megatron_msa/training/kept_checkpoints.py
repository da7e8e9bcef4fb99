"""--keep-newest-checkpoints: several checkpoints to fall back on, where Megatron keeps one.

With --save-retain-interval megatron-core 0.19.2 deletes the checkpoint before the newest as soon as that is
complete. One that is damaged later then leaves nothing to resume from but the last retained one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron.training import checkpointing

from megatron_msa.checkpoint.newest import saved_iterations


def keep_newest(count: int, retain_interval: int) -> None:
    """Let Megatron's deletion, which it starts on rank 0, leave so many checkpoints. May be called again.

    Args:
        count: of complete checkpoints; 1 is Megatron's own behaviour.
        retain_interval: iterations that are multiples of it stay anyway.
    """
    original = getattr(checkpointing._async_delete_checkpoint_impl, "__wrapped__", None)
    original = original or checkpointing._async_delete_checkpoint_impl

    @functools.wraps(original)
    def delete(save_path: str, iteration_to_delete: int, *args: Any, **kwargs: Any) -> None:
        for iteration in superseded(Path(save_path), iteration_to_delete, count, retain_interval):
            original(save_path, iteration, *args, **kwargs)

    checkpointing._async_delete_checkpoint_impl = delete


def superseded(folder: Path, before_newest: int, count: int, retain_interval: int) -> list[int]:
    """Iterations whose checkpoints are to go when a newer one than ``before_newest`` is complete."""
    older = [
        iteration
        for iteration in saved_iterations(folder)
        if iteration <= before_newest and not (folder / f"iter_{iteration:07d}").is_symlink()
    ]
    return [iteration for iteration in older[count - 1 :] if iteration % retain_interval]
