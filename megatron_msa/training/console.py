"""The compact console line of a logged step, with an estimate of the time that is left."""

from __future__ import annotations

import time
from typing import Any


class StepLine:
    """Formats logged steps; remembers the last measured recall, which is sampled, and the pace of the run."""

    def __init__(self, train_iters: int) -> None:
        self._total = train_iters
        self._recall: float | None = None
        self._start: tuple[int, float] | None = None

    def format(self, row: dict[str, Any]) -> str:
        """One line for a row of the metrics file."""
        iteration = row["iteration"]
        self._recall = row.get("score_recall", self._recall)
        width = len(str(self._total))
        parts = [
            f"step {iteration:>{width}}/{self._total} {row['phase']:<10}",
            f"loss {_number(row.get('lm_loss'))}",
            f"kl {_number(row.get('kl'))}",
            f"recall {_number(self._recall)}",
            f"{row['tokens_per_second']:>9,.0f} tok/s",
            f"{row['tflops_executed']:.3g} TFLOP/s",
        ]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        parts.append(f"left {self._time_left(iteration)}")
        return " | ".join(parts)

    def _time_left(self, iteration: int) -> str:
        # The pace since the first logged step: it includes validation and checkpoints, not the start-up.
        now = time.monotonic()
        if self._start is None:
            self._start = (iteration, now)
            return "--:--"
        done, elapsed = iteration - self._start[0], now - self._start[1]
        seconds = round(elapsed / max(done, 1) * (self._total - iteration))
        hours, rest = divmod(seconds, 3600)
        return (f"{hours}:" if hours else "") + f"{rest // 60:02d}:{rest % 60:02d}"


def _number(value: float | None) -> str:
    return "   -  " if value is None else f"{value:6.4f}"
