"""Append-only JSON lines: one object per logged step, validation and phase switch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Writes rows to a JSONL file; only the rank that logs opens one.

    Every row is flushed, so a killed run keeps what it logged. NaN and infinity become null: they are not JSON.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **_json_safe(values)}) + "\n")
        self._file.flush()


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
