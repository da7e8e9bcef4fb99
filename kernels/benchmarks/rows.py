"""Measured rows: one candidate on one shape, as it is kept in results/rows.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Row:
    """One measurement. Empty or None: not measured, or without meaning.

    Attributes:
        group: of experiments.py.
        op: what was computed.
        shape: name in registry.py.
        pattern: how blocks were selected.
        candidate: the implementation.
        is_ours: 1 for msa_kernels.
        queries: tokens that ask.
        keys: tokens that are asked.
        documents: documents among the keys.
        weight: real calls that the shape stands for.
        check: "passed", "failed: ..." or "skipped: ...". Only rows that passed have times.
        check_error: largest error found, relative to its limit.
        ms: median over ``repeats``.
        ms_p20: 20 % quantile.
        ms_p80: 80 % quantile.
        repeats: timed calls.
        tflop: useful work.
        tflops: TFLOP/s of it.
        share_of_matmul: of matmul_tflops.
        gigabytes: compulsory traffic.
        tbps: TB/s of it.
        share_of_copy: of copy_tbps.
        extra_gib: peak memory beyond inputs and outputs.
        matmul_tflops: an 8192^3 matmul in the same dtype, measured just before this experiment.
        copy_tbps: a device copy, bytes read and written, measured just before.
        package: distribution and version, for baselines.
        gpu: name of the device.
        driver: its driver.
        torch: version.
        triton: version.
        cudnn: version.
        commit: of this repository.
        date: start of the run.
    """

    group: str
    op: str
    shape: str
    pattern: str
    candidate: str
    is_ours: int
    queries: int
    keys: int
    documents: int
    weight: int
    check: str
    check_error: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    repeats: int = 0
    tflop: float | None = None
    tflops: float | None = None
    share_of_matmul: float | None = None
    gigabytes: float | None = None
    tbps: float | None = None
    share_of_copy: float | None = None
    extra_gib: float | None = None
    matmul_tflops: float | None = None
    copy_tbps: float | None = None
    package: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    cudnn: str = ""
    commit: str = ""
    date: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result was right and hence timed."""
        return self.check == "passed"

    @property
    def key(self) -> tuple[str, ...]:
        """What is measured; a newer row with the same key replaces an older one."""
        return (self.group, self.op, self.shape, self.pattern, self.candidate)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in asdict(row).items()} for row in rows)


def read(path: Path) -> list[Row]:
    """What ``write`` wrote."""
    with path.open(newline="") as file:
        return [
            Row(**{field.name: _parsed(field, line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _parsed(field: Any, text: str) -> Any:
    if field.type == "int":
        return int(text)
    if field.type == "float | None":
        return float(text) if text else None
    return text
