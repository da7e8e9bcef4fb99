"""The project's bars, each from the rows of one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rows import Row

# The selection that counts is that of block_select; the other patterns stand beside it.
PATTERN = "index"
OTHER_PATTERNS = ("local", "random")


class Bar(NamedTuple):
    """A figure to reach.

    Attributes:
        name: key in summary.json.
        what: for people.
        bar: to reach.
        stretch: to aim at.
        unit: "x", "share" or "GiB"; of GiB less is better.
        compute: maps the rows to the entry's figures; raises ``Missing`` where some are not there.
    """

    name: str
    what: str
    bar: float
    stretch: float
    unit: str
    compute: Callable[[list[Row]], dict[str, Any]]


class Missing(Exception):
    """Rows that a bar needs are not there; the message says which."""


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """summary.json: an entry per bar, and what the figures depend on.

    A bar that needs a row which is not there, or whose result was wrong, has the value None and a reason.
    """
    rows = list(rows)
    timed = [row for row in rows if row.passed]
    return {each.name: _entry(each, rows) for each in BARS} | {
        **{
            name: _all(rows, name) for name in ("gpu", "driver", "torch", "triton", "cudnn", "commit", "date")
        },
        "matmul_tflops": _median(row.matmul_tflops for row in timed),
        "copy_tbps": _median(row.copy_tbps for row in timed),
        "baselines": sorted({row.package for row in timed if row.package}),
        "wrong_results": [_reason(row) for row in rows if row.is_ours and row.check.startswith("failed")],
        "not_measured": sorted({_reason(row) for row in rows if not row.passed}),
    }


def write(path: Path, summary: dict[str, Any]) -> None:
    """As JSON. Entries that others wrote there (speed of whole models) stay."""
    others = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(others | summary, indent=2) + "\n")


def reached(bar: Bar, value: float, goal: float) -> bool:
    """Whether a value is as good as the goal."""
    return value <= goal if bar.unit == "GiB" else value >= goal


def best_dense(rows: Iterable[Row], op: str, shape: str, group: str = "context") -> Row:
    """The fastest dense kernel of the same experiment.

    Raises:
        Missing: there is none.
    """
    dense = [
        row
        for row in rows
        if (row.group, row.op, row.shape, row.pattern) == (group, op, shape, "")
        and row.passed
        and not row.is_ours
    ]
    if not dense:
        raise Missing(f"no dense kernel was measured for {op} at {shape}")
    return min(dense, key=lambda row: row.ms or float("inf"))


def ours(rows: Iterable[Row], group: str, op: str, shape: str, pattern: str) -> Row:
    """Our row.

    Raises:
        Missing: it was not measured.
    """
    for row in rows:
        if row.is_ours and (row.group, row.op, row.shape, row.pattern) == (group, op, shape, pattern):
            if not row.passed:
                raise Missing(_reason(row))
            return row
    raise Missing(f"{op} at {shape} was not measured")


def _entry(bar: Bar, rows: list[Row]) -> dict[str, Any]:
    try:
        figures = bar.compute(rows)
    except Missing as missing:
        figures = {"value": None, "reason": str(missing)}
    value = figures["value"]
    return {
        "value": value,
        "unit": bar.unit,
        "bar": bar.bar,
        "stretch": bar.stretch,
        "reached": None if value is None else reached(bar, value, bar.bar),
        "what": bar.what,
    } | figures


def _speedup(op: str, shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        dense = best_dense(rows, op, shape)
        own = ours(rows, "context", op, shape, PATTERN)
        same = [
            row for row in rows if row.passed and (row.group, row.op, row.shape) == ("context", op, shape)
        ]
        return {
            "value": _ratio(dense.ms, own.ms),
            "tokens": own.queries,
            "pattern": PATTERN,
            "ms": own.ms,
            "best_dense": dense.candidate,
            "dense_ms": {row.candidate: row.ms for row in same if not row.is_ours},
            "other_patterns": {
                row.pattern: _ratio(dense.ms, row.ms)
                for row in same
                if row.is_ours and row.pattern in OTHER_PATTERNS
            },
        }

    return compute


def _index_share(shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        own = ours(rows, "select", "select", shape, PATTERN)
        with_lse = ours(rows, "select", "select with LSE", shape, PATTERN)
        return {
            "value": own.share_of_matmul,
            "tokens": own.queries,
            "ms": own.ms,
            "tflops": own.tflops,
            "matmul_tflops": own.matmul_tflops,
            "with_lse": {"value": with_lse.share_of_matmul, "ms": with_lse.ms, "tflops": with_lse.tflops},
        }

    return compute


def _real_share(op: str, *also: str) -> Callable[[list[Row]], dict[str, Any]]:
    def share(rows: list[Row], op: str, pattern: str) -> dict[str, Any]:
        """Weighted work over weighted time at the matmul rate; the mean TFLOP/s and ms of a call."""
        own = [
            row for row in rows if row.is_ours and (row.group, row.op, row.pattern) == ("real", op, pattern)
        ]
        for row in own:
            if row.check.startswith("failed"):
                raise Missing(_reason(row))
        own = [row for row in own if row.passed]
        if not own:
            raise Missing(f"{op} on the real shapes ({pattern}) was not measured")
        work = sum(row.weight * (row.tflop or 0) for row in own)
        time = sum(row.weight * (row.ms or 0) for row in own)
        possible = sum(row.weight * (row.ms or 0) * (row.matmul_tflops or 0) for row in own)
        return {
            "value": work / possible * 1e3,
            "tflops": work / time * 1e3,
            "mean_ms": time / sum(row.weight for row in own),
            "shapes": len(own),
        }

    def measured(rows: list[Row], op: str, pattern: str) -> bool:
        own = [row for row in rows if (row.group, row.op, row.pattern) == ("real", op, pattern)]
        return any(row.passed for row in own) and not any(row.check.startswith("failed") for row in own)

    def compute(rows: list[Row]) -> dict[str, Any]:
        figures = share(rows, op, PATTERN) | {"pattern": PATTERN}
        figures["other_patterns"] = {
            each: share(rows, op, each)["value"] for each in OTHER_PATTERNS if measured(rows, op, each)
        }
        for other in also:
            if measured(rows, other, PATTERN):
                figures[other] = share(rows, other, PATTERN)
        return figures

    return compute


def _topk(shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        own = ours(rows, "topk", "topk", shape, "")
        theirs = best_dense(rows, "topk", shape, group="topk")
        return {
            "value": _ratio(theirs.ms, own.ms),
            "tokens": own.queries,
            "ms": own.ms,
            "torch_topk_ms": theirs.ms,
            "tbps": own.tbps,
            "share_of_copy": own.share_of_copy,
        }

    return compute


def _extra(shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        own = ours(rows, "memory", "train", shape, PATTERN)
        if own.extra_gib is None:
            raise Missing("memory is measured on a GPU only")
        return {"value": own.extra_gib, "tokens": own.queries, "pattern": PATTERN, "ms": own.ms}

    return compute


def _decode_speedup(op: str, shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        """Against the fastest dense kernel, our own over the paged cache included."""
        own = ours(rows, "decode", op, shape, PATTERN)
        dense = {
            row.candidate: row.ms
            for row in rows
            if (row.group, row.op, row.shape) == ("decode", "decode dense", shape) and row.passed
        }
        if not dense:
            raise Missing(f"no dense kernel was measured for decoding at {shape}")
        best = min(dense, key=lambda name: dense[name] or float("inf"))
        return {
            "value": _ratio(dense[best], own.ms),
            "tokens": own.keys // own.queries,
            "sequences": own.queries,
            "ms": own.ms,
            "best_dense": best,
            "dense_ms": dense,
        }

    return compute


def _byte_share(op: str, shape: str) -> Callable[[list[Row]], dict[str, Any]]:
    def compute(rows: list[Row]) -> dict[str, Any]:
        own = ours(rows, "decode", op, shape, PATTERN)
        return {
            "value": own.share_of_copy,
            "tokens": own.keys // own.queries,
            "sequences": own.queries,
            "ms": own.ms,
            "gigabytes": own.gigabytes,
            "copy_tbps": own.copy_tbps,
        }

    return compute


BARS = (
    Bar(
        "prefill_1m_speedup",
        "select + attend, 1,048,576 tokens, against the best dense kernel",
        14.2,
        20,
        "x",
        _speedup("prefill", "1m"),
    ),
    Bar("prefill_128k_speedup", "the same at 131,072", 9, 12, "x", _speedup("prefill", "128k")),
    Bar("prefill_32k_speedup", "the same at 32,768", 3.5, 5, "x", _speedup("prefill", "32k")),
    Bar(
        "train_128k_speedup",
        "select + attend + KL, forward and backward, 131,072 tokens, against dense",
        8,
        12,
        "x",
        _speedup("train", "128k"),
    ),
    Bar(
        "index_share_128k",
        "index scores and top-k, 131,072 tokens: share of the bf16 matmul rate",
        0.5,
        0.65,
        "share",
        _index_share("128k"),
    ),
    Bar(
        "forward_share_real",
        "attention forward on the real shapes: share of that rate",
        0.35,
        0.5,
        "share",
        _real_share("forward", "forward with KL"),
    ),
    Bar(
        "backward_share_real",
        "attention backward with KL gradient on the real shapes: share of that rate",
        0.3,
        0.45,
        "share",
        _real_share("backward with KL"),
    ),
    Bar(
        "topk_speedup",
        "top-k of the block scores of 131,072 tokens against torch.topk",
        5,
        10,
        "x",
        _topk("128k"),
    ),
    Bar(
        "extra_gib_256k",
        "memory beyond inputs and outputs, training step of 262,144 tokens",
        8,
        5,
        "GiB",
        _extra("256k"),
    ),
    Bar(
        "decode_1m_b4_speedup",
        "a new token, 1,048,576 cached, batch 4, against the best dense kernel",
        6,
        7,
        "x",
        _decode_speedup("decode", "1m-b4"),
    ),
    Bar(
        "decode_1m_b4_8bit_speedup",
        "the same with 8-bit index keys",
        9,
        13,
        "x",
        _decode_speedup("decode 8-bit index", "1m-b4"),
    ),
    Bar(
        "decode_128k_b16_speedup",
        "a new token, 131,072 cached, batch 16",
        4,
        6,
        "x",
        _decode_speedup("decode", "128k-b16"),
    ),
    Bar(
        "decode_1m_b4_byte_share",
        "index keys, chosen keys and values read once, 1,048,576 cached, batch 4: share of the copy rate",
        0.7,
        0.85,
        "share",
        _byte_share("decode", "1m-b4"),
    ),
)


def _reason(row: Row) -> str:
    pattern = f", {row.pattern}" if row.pattern else ""
    return f"{row.candidate} ({row.op}, {row.shape}{pattern}): {row.check}"


def _ratio(dense: float | None, own: float | None) -> float:
    assert dense is not None
    assert own is not None
    return dense / own


def _all(rows: list[Row], name: str) -> str:
    return ", ".join(sorted({str(getattr(row, name)) for row in rows}))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
