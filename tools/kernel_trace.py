"""GPU kernels of a profiler trace: how long they run, and what runs beside the collectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]
"""Start and end in microseconds."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on the device.

    Attributes:
        annotation: the innermost named range (`torch.profiler.record_function`) it was launched in, if any.
    """

    name: str
    interval: Interval
    annotation: str | None

    @property
    def is_collective(self) -> bool:
        return "nccl" in self.name.lower()


class Kernels:
    """The kernels of one iteration, in order of their start."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self.all = sorted(kernels, key=lambda kernel: kernel.interval)

    @classmethod
    def of_trace(cls, events: Sequence[dict[str, Any]]) -> Kernels:
        """From the events of a Chrome trace, as `torch.profiler` exports it."""
        ranges = [
            (event["ts"], event["ts"] + event["dur"], event["name"], event["tid"])
            for event in events
            if event.get("cat") == "user_annotation"
        ]
        launched_in: dict[int, str] = {}
        for event in events:
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
                around = [
                    (end - start, name)
                    for start, end, name, thread in ranges
                    if thread == event["tid"] and start <= event["ts"] <= end
                ]
                if around:
                    launched_in[event["args"]["correlation"]] = min(around)[1]
        return cls(
            Kernel(
                event["name"],
                (event["ts"], event["ts"] + event["dur"]),
                launched_in.get(event["args"].get("correlation")),
            )
            for event in events
            if event.get("cat") == "kernel"
        )

    def summary(self, annotations: Iterable[str]) -> dict[str, Any]:
        """Milliseconds on the device, per annotation and for the longest kernels by name."""
        by_name: dict[str, float] = {}
        for kernel in self.all:
            name = kernel.name[:80]
            by_name[name] = by_name.get(name, 0.0) + length([kernel.interval])
        longest = sorted(by_name.items(), key=lambda item: -item[1])[:25]
        return {
            "device_ms": {
                name: round(length([k.interval for k in self.all if k.annotation == name]) / 1e3, 3)
                for name in annotations
            },
            "kernels_ms": {name: round(total / 1e3, 3) for name, total in longest},
        }

    def collectives(self, beside: str) -> dict[str, Any]:
        """Each collective: milliseconds, the share beside any other kernel and beside those of a named range.

        ``share`` is the time of all collectives over the time from the first to the last kernel; ``exposed``
        the part of it in which nothing else runs.
        """
        others = [kernel.interval for kernel in self.all if not kernel.is_collective]
        named = [kernel.interval for kernel in self.all if kernel.annotation == beside]
        found = [kernel for kernel in self.all if kernel.is_collective]
        intervals = [kernel.interval for kernel in found]
        whole = self.all[-1:] and max(kernel.interval[1] for kernel in self.all) - self.all[0].interval[0]
        total, hidden = length(intervals), overlap(intervals, others)
        return {
            "each": [
                {
                    "name": kernel.name[:60],
                    "at_ms": round((kernel.interval[0] - self.all[0].interval[0]) / 1e3, 3),
                    "ms": round(length([kernel.interval]) / 1e3, 3),
                    "hidden": _share(overlap([kernel.interval], others), length([kernel.interval])),
                    f"beside {beside}": _share(overlap([kernel.interval], named), length([kernel.interval])),
                }
                for kernel in found
            ],
            "total_ms": round(total / 1e3, 3),
            "share": _share(total, whole or 0.0),
            "exposed_ms": round((total - hidden) / 1e3, 3),
            "hidden": _share(hidden, total),
        }


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Of the union."""
    return sum(end - start for start, end in merged(intervals))


def overlap(first: Iterable[Interval], second: Iterable[Interval]) -> float:
    """Length of the intersection of two unions."""
    a, b = merged(first), merged(second)
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None
