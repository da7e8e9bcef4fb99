"""Measures one experiment: every candidate is checked, then those that passed are timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import environment
from benchmarks.candidate import Candidate, Experiment, Unavailable
from benchmarks.rows import Row
from benchmarks.timing import Clock, Memory, Times, round_robin, rounds_within

MATMUL_SIZE = 8192
COPY_BYTES = 2**31
# Milliseconds that the timed calls of one experiment may take together; three rounds may take more.
BUDGET_MS = 400.0
TINY_BUDGET_MS = 10.0


class Ceilings:
    """What the device reaches: a large matrix product and a copy, timed in turn before each experiment."""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock, *, tiny: bool) -> None:
        self._clock = clock
        self._size = 64 if tiny else MATMUL_SIZE
        options: dict[str, Any] = {"device": device}
        self._left, self._right = torch.randn(2, self._size, self._size, dtype=dtype, **options)
        self._source = torch.zeros((2**12 if tiny else COPY_BYTES) // 2, dtype=torch.int8, **options)
        self._target = torch.empty_like(self._source)

    def measure(self) -> tuple[float, float]:
        """TFLOP/s and TB/s (bytes read and written)."""
        calls = {
            "matmul": lambda: self._left @ self._right,
            "copy": lambda: self._target.copy_(self._source),
        }
        samples = round_robin(calls, dict.fromkeys(calls, 12), self._clock)
        # The first two rounds let the clock rate come up.
        medians = {name: Times.of(times[2:]).median for name, times in samples.items()}
        return (
            2 * self._size**3 / medians["matmul"] / 1e9,
            2 * self._source.numel() / medians["copy"] / 1e9,
        )


def measure(
    experiment: Experiment,
    clock: Clock,
    memory: Memory,
    ceilings: Ceilings,
    facts: Mapping[str, Any],
    *,
    budget_ms: float = BUDGET_MS,
) -> list[Row]:
    """One row per candidate; only candidates that passed their check have times.

    Args:
        experiment: what to measure.
        clock: times one call.
        memory: measures the peak of one call.
        ceilings: measured first.
        facts: columns from ``environment.describe``.
        budget_ms: for the timed calls; three rounds may take more.
    """
    matmul_tflops, copy_tbps = ceilings.measure()
    rows: list[Row] = []
    ready: list[tuple[Candidate, Row, Callable[[], Any], float]] = []
    for candidate in experiment.candidates:
        row = _new_row(experiment, candidate, facts)
        row.matmul_tflops, row.copy_tbps = matmul_tflops, copy_tbps
        rows.append(row)
        run, milliseconds = _check(candidate, row, clock, memory)
        if run is not None:
            ready.append((candidate, row, run, milliseconds))

    repeated = {number: run for number, (candidate, _, run, _) in enumerate(ready) if not candidate.once}
    # The call that showed the memory is the first sample.
    count = rounds_within(budget_ms, sum(ready[number][3] for number in repeated)) - 1
    samples = round_robin(repeated, dict.fromkeys(repeated, count), clock)
    for number, (candidate, row, _, milliseconds) in enumerate(ready):
        _fill(row, candidate, [milliseconds, *samples.get(number, [])])
    return rows


def left_out(experiment: Experiment, facts: Mapping[str, Any], reason: str) -> list[Row]:
    """Rows of an experiment that is not run."""
    rows = [_new_row(experiment, candidate, facts) for candidate in experiment.candidates]
    for row in rows:
        row.check = f"skipped: {reason}"
    return rows


def _new_row(experiment: Experiment, candidate: Candidate, facts: Mapping[str, Any]) -> Row:
    shape = experiment.shape
    version = environment.version_of(candidate.package) if candidate.package else ""
    return Row(
        group=experiment.group,
        op=candidate.op,
        shape=shape.name,
        pattern=candidate.pattern,
        candidate=candidate.name,
        is_ours=int(candidate.is_ours),
        queries=shape.num_queries,
        keys=shape.num_keys,
        documents=shape.num_documents,
        weight=shape.weight,
        check="",
        package=f"{candidate.package} {version}".strip(),
        **facts,
    )


def _check(
    candidate: Candidate, row: Row, clock: Clock, memory: Memory
) -> tuple[Callable[[], Any] | None, float]:
    """Runs and checks the candidate and fills the row's check and memory columns.

    Returns:
        The call, None if it must not be timed, and the milliseconds that it took once.
    """
    try:
        run, check, needs_result = candidate.start()
        if candidate.warm:
            verdict = check(run() if needs_result else None)
        (milliseconds, result), extra = memory.measure(lambda: clock.time(run))
        if not candidate.warm:
            verdict = check(result)
    except Unavailable as error:
        row.check = f"skipped: {_first_line(error)}"
        return None, 0.0
    except Exception as error:  # a baseline may fail in ways of its own; ours must not, and fails the run
        row.check = f"failed: {type(error).__name__}: {_first_line(error)}"
        return None, 0.0
    row.check = "passed" if verdict.passed else "failed: " + "; ".join(verdict.errors)
    row.check_error = verdict.worst
    row.extra_gib = None if extra is None else extra / 2**30
    return (run if verdict.passed else None), milliseconds


def _fill(row: Row, candidate: Candidate, samples: list[float]) -> None:
    times = Times.of(samples)
    row.ms, row.ms_p20, row.ms_p80, row.repeats = times
    assert row.matmul_tflops is not None
    assert row.copy_tbps is not None
    if candidate.flops:
        row.tflop = candidate.flops / 1e12
        row.tflops = candidate.flops / times.median / 1e9
        row.share_of_matmul = row.tflops / row.matmul_tflops
    if candidate.bytes:
        row.gigabytes = candidate.bytes / 1e9
        row.tbps = candidate.bytes / times.median / 1e9
        row.share_of_copy = row.tbps / row.copy_tbps


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
