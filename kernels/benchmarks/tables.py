"""Markdown tables for README.md and docs/results.md, from rows.csv and summary.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.rows import Row
from benchmarks.summary import BARS, OTHER_PATTERNS, PATTERN, Bar, Missing, best_dense


def bars(summary: dict[str, Any]) -> str:
    """One line per bar: what, bar, stretch, measured, made of."""
    lines = []
    for bar in BARS:
        entry = summary[bar.name]
        value = entry["value"]
        measured = f"**{_figure(bar, value)}**" if value is not None else f"not measured: {entry['reason']}"
        lines.append(
            [bar.what, _figure(bar, bar.bar), _figure(bar, bar.stretch), measured, _made_of(bar, entry)]
        )
    return _table(["what", "bar", "stretch", "measured", "from"], lines)


def contexts(rows: Iterable[Row]) -> str:
    """Milliseconds against dense by context length."""
    rows = [row for row in rows if row.passed and row.group == "context"]
    own = {(row.op, row.queries): row for row in rows if row.is_ours and row.pattern == PATTERN}
    lines = []
    for tokens in sorted({tokens for _, tokens in own}):
        line = [f"{tokens:,}"]
        for op in ("prefill", "train"):
            row = own.get((op, tokens))
            try:
                if row is None:
                    raise Missing
                dense = best_dense(rows, op, row.shape)
            except Missing:
                line += ["", "", ""]
                continue
            assert row.ms is not None
            assert dense.ms is not None
            line += [_ms(row.ms), f"{_ms(dense.ms)} ({dense.candidate})", f"{dense.ms / row.ms:.1f}x"]
        lines.append(line)
    header = [
        "tokens",
        "select + attend, ms",
        "dense, ms",
        "",
        "forward + backward with KL, ms",
        "dense, ms",
        "",
    ]
    return _table(header, lines)


def operators(rows: Iterable[Row]) -> str:
    """Every timed row outside the context group and the real shapes."""
    lines = [
        [
            row.op,
            row.shape,
            row.pattern,
            row.candidate,
            _ms(row.ms),
            f"{_ms(row.ms_p20)} - {_ms(row.ms_p80)}",
            f"{row.tflops:.0f}" if row.tflops else "",
            f"{100 * row.share_of_matmul:.0f} %" if row.share_of_matmul else "",
            f"{row.tbps:.2f}" if row.tbps else "",
            f"{row.extra_gib:.2f}" if row.extra_gib is not None else "",
        ]
        for row in rows
        if row.passed and row.group not in ("context", "real")
    ]
    header = [
        "operator",
        "shape",
        "selection",
        "kernel",
        "ms",
        "20 - 80 %",
        "TFLOP/s",
        "of matmul",
        "TB/s",
        "extra GiB",
    ]
    return _table(header, lines)


def environment(summary: dict[str, Any]) -> str:
    """One line on hardware, versions, commit, ceilings."""
    parts = [
        f"{summary['gpu']}, driver {summary['driver']}, torch {summary['torch']}",
        f"Triton {summary['triton']}, cuDNN {summary['cudnn']}",
        *summary["baselines"],
        f"commit {summary['commit']}, {summary['date']}",
    ]
    if summary["matmul_tflops"] and summary["copy_tbps"]:
        parts.append(
            f"ceilings of the run: 8192^3 matmul {summary['matmul_tflops']:.0f} TFLOP/s, "
            f"copy {summary['copy_tbps']:.2f} TB/s"
        )
    return "; ".join(parts) + "."


def everything(rows: Sequence[Row], summary: dict[str, Any]) -> str:
    """All tables, with the line on hardware and versions."""
    parts = [environment(summary), bars(summary), contexts(rows), operators(rows)]
    if summary["not_measured"]:
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in summary["not_measured"]))
    return "\n\n".join(parts)


def _figure(bar: Bar, value: float) -> str:
    return {"x": f"{value:.3g}x", "share": f"{100 * value:.0f} %", "GiB": f"{value:.2g} GiB"}[bar.unit]


def _made_of(bar: Bar, entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return ""
    parts = []
    if "best_dense" in entry:
        name = entry["best_dense"]
        parts.append(f"{_ms(entry['ms'])} ms against {_ms(entry['dense_ms'][name])} ms ({name})")
    elif "torch_topk_ms" in entry:
        parts.append(f"{_ms(entry['ms'])} ms against {_ms(entry['torch_topk_ms'])} ms")
    elif "tflops" in entry:
        parts.append(f"{entry['tflops']:.0f} TFLOP/s")
    for pattern in OTHER_PATTERNS:
        if pattern in entry.get("other_patterns", {}):
            parts.append(f"{pattern} {_figure(bar, entry['other_patterns'][pattern])}")
    for name, label in (("with_lse", "with LSE"), ("forward with KL", "with KL")):
        if name in entry:
            parts.append(f"{label} {_figure(bar, entry[name]['value'])}")
    return ", ".join(parts)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
