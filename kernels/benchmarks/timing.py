"""Milliseconds of calls on a device, and the memory they take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[], Any]


class Clock(Protocol):
    """Times one call."""

    def time(self, call: Call) -> tuple[float, Any]:
        """Milliseconds of the call, and what it returned."""


class CudaClock:
    """Time between two CUDA events, with a cold L2 cache and the launches of the call waiting in the queue.

    A buffer larger than the cache is written before, for as long as the host takes to launch a call: in a
    model the GPU works on earlier layers meanwhile, and does not wait for launches. Calls that launch for
    longer than ``lead_ms``, and than they compute, still show it.
    """

    def __init__(self, l2_bytes: int = 2**28, lead_ms: float = 2.0) -> None:
        self._buffer = torch.empty(l2_bytes, dtype=torch.int8, device="cuda")
        self._writes = 1
        self.time(lambda: None)
        alone, _ = self.time(self._buffer.zero_)
        self._writes = math.ceil(lead_ms / alone)

    def time(self, call: Call) -> tuple[float, Any]:
        """See ``Clock``."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._writes):
            self._buffer.zero_()
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), result


class CpuClock:
    """Wall time."""

    def time(self, call: Call) -> tuple[float, Any]:
        """See ``Clock``."""
        start = time.perf_counter()
        result = call()
        return (time.perf_counter() - start) * 1e3, result


class Times(NamedTuple):
    """Milliseconds over the repeats of a call."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        """Median and quantiles (linear between neighbours)."""
        ordered = sorted(samples)
        return cls(statistics.median(ordered), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def round_robin[Key](
    calls: Mapping[Key, Call], rounds: Mapping[Key, int], clock: Clock
) -> dict[Key, list[float]]:
    """Times all calls once, then all again, and so on: drifts of the clock rate meet all of them alike.

    Args:
        calls: by name.
        rounds: how often each is timed; a call takes part in the first rounds until it has its number.
        clock: what times them.
    """
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if number < rounds[name]:
                samples[name].append(clock.time(call)[0])
    return samples


def rounds_within(budget_ms: float, once_around_ms: float, *, least: int = 3, most: int = 20) -> int:
    """How many rounds of calls that take ``once_around_ms`` together fit into the budget."""
    return max(least, min(most, int(budget_ms / max(once_around_ms, 1e-6))))


class Memory:
    """Peak of a call's memory beyond what was there before and what it returns."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def measure(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """What the call returns, and its extra bytes; None on a CPU."""
        if not self._on_gpu:
            return call(), None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return result, max(0, peak - _bytes_held(result))


def _bytes_held(result: Any) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(result)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for each in result:
            yield from _tensors(each)
