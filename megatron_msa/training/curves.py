"""One picture of a training run: loss, KL, recall and selection over the steps, from its metrics JSONL.

python tools/plot_curves.py runs/tiny/metrics.jsonl --output runs/tiny/curves.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_msa.errors import ConfigError

Series = tuple[list[int], list[float]]
"""Iterations and values, in order; entries that were not measured are left out."""


@dataclass(frozen=True)
class PhaseSpan:
    """A phase and the iterations in which it ran: after ``start``, up to and including ``end``."""

    phase: str
    start: int
    end: int


@dataclass(frozen=True)
class RunMetrics:
    """What a metrics file says about a run, each iteration once.

    Attributes:
        steps: rows of the logged steps, by iteration.
        validations: rows of the validation losses, by iteration.
        phases: in order and without gaps; the last one ends with the last logged step.
        skipped_lines: lines that are not JSON objects, apart from an unfinished last one.
    """

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    phases: list[PhaseSpan]
    skipped_lines: int = 0

    def series(self, name: str) -> Series:
        """A value of the logged steps."""
        return _series((row["iteration"], row.get(name)) for row in self.steps)

    def layers(self, name: str) -> dict[int, Series]:
        """A per-layer value such as "kl_per_layer", by layer number."""
        rows = [(row["iteration"], row[name]) for row in self.steps if isinstance(row.get(name), dict)]
        numbers = sorted({int(layer) for _, values in rows for layer in values})
        return {n: _series((iteration, values.get(str(n))) for iteration, values in rows) for n in numbers}

    def validation_loss(self) -> Series:
        return _series((row["iteration"], row.get("lm_loss")) for row in self.validations)


def load_metrics(path: str | Path) -> RunMetrics:
    """Read a run's metrics file.

    A resumed run appends to the file: the last row of an iteration wins, and the start of a process (a
    phase row without a previous phase) discards what an earlier process had logged beyond the checkpoint.

    Raises:
        ConfigError: the file holds no logged step.
        OSError: the file cannot be read.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}, "phase": {}}
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    skipped = 0
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            skipped += bool(line.strip()) and number < len(lines)
            continue
        event, iteration = row.get("event"), row.get("iteration")
        if event not in rows or not isinstance(iteration, int) or (event == "phase" and not row.get("phase")):
            continue
        if event == "phase" and row.get("previous", "") is None:
            for kind in rows:
                rows[kind] = {i: kept for i, kept in rows[kind].items() if i <= iteration}
        rows[event][iteration] = row
    if not rows["step"]:
        raise ConfigError(f'{path} holds no logged step (a line with "event": "step"); is it a metrics file?')
    steps, validations, switches = ([rows[kind][i] for i in sorted(rows[kind])] for kind in rows)
    return RunMetrics(steps, validations, _phase_spans(steps, switches), skipped)


def _parse(line: str) -> dict[str, Any] | None:
    # A killed run leaves an unfinished line, to which its successor appends: look for the last row in it too.
    for start in (0, line.rfind('{"event"')):
        try:
            row = json.loads(line[max(start, 0) :])
        except json.JSONDecodeError:
            continue
        return row if isinstance(row, dict) else None
    return None


def _series(points: Iterable[tuple[int, Any]]) -> Series:
    measured = [(i, float(v)) for i, v in points if isinstance(v, int | float) and math.isfinite(v)]
    return [i for i, _ in measured], [v for _, v in measured]


def _phase_spans(steps: list[dict[str, Any]], switches: list[dict[str, Any]]) -> list[PhaseSpan]:
    """The phases of the logged steps; a phase row between two steps says where exactly the phase began."""
    starts: list[tuple[str, int]] = []
    before = -1
    for row in steps:
        recent = (s for s in switches if before <= s["iteration"] < row["iteration"])
        between = {s["phase"]: s["iteration"] for s in recent}
        current = starts[-1][0] if starts else None
        phase = row.get("phase") or next(reversed(between), current)
        if phase and phase != current:
            starts.append((phase, between.get(phase, before if before >= 0 else row["iteration"] - 1)))
        before = row["iteration"]
    if not starts:
        return []
    ends = [*(start for _, start in starts[1:]), before]
    return [PhaseSpan(phase, start, end) for (phase, start), end in zip(starts, ends, strict=True)]


# -- drawing -------------------------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _PURPLE = "#1f5fa8", "#d9730d", "#2a8c5a", "#7a4fa3"
_INK, _MUTED, _GRID = "#222222", "#6b6b6b", "#e3e3e3"
_LAYERS: Colormap = LinearSegmentedColormap.from_list("layers", ["#f2b134", "#c8553d", "#5b2a6f"])
_PHASES = {  # strip above each panel, shade behind it
    "dense": ("#c9ced6", "#f5f6f8"),
    "index_only": ("#dac7ea", "#f8f4fb"),
    "warmup": ("#f6d8ae", "#fdf7ec"),
    "sparse": ("#bcd7f2", "#f2f7fd"),
}
_UNKNOWN_PHASE = ("#dddddd", "#fafafa")
_MANY_LAYERS = 4  # beyond this a colour bar replaces one legend entry per layer


def draw_curves(
    metrics: RunMetrics, png_path: str | Path, *, title: str, unigram_loss: float | None = None
) -> None:
    """Draw loss, KL, recall and selection against the step, with the phases marked, as one PNG.

    Args:
        metrics: of one run.
        png_path: written (its directory is created).
        title: headline of the picture.
        unigram_loss: loss of a model that ignores context, in nats per token; drawn as a horizontal line.
    """
    spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(13.5, 8.2), dpi=130, layout=spacing, facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=16, fontweight="bold", color=_INK)
    (loss, kl), (recall, selection) = figure.subplots(2, 2)
    _draw_loss(loss, metrics, unigram_loss)
    _draw_kl(kl, metrics)
    _draw_recall(recall, metrics)
    _draw_selection(selection, metrics)
    for axes in (loss, kl, recall, selection):
        _mark_phases(axes, metrics)
    figure.supxlabel(_summary(metrics), x=0.012, ha="left", fontsize=9.5, color=_MUTED)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


def _draw_loss(axes: Axes, metrics: RunMetrics, unigram_loss: float | None) -> None:
    _panel(axes, "Language model loss", "nats per token")
    steps, values = metrics.series("lm_loss")
    reach = _smoothing(values)
    label = f"train (mean of {2 * reach + 1} logged steps)" if reach else "train"
    if reach:
        axes.plot(steps, values, color=_BLUE, alpha=0.22, linewidth=0.8)
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, _centred_mean(values, reach), marker, color=_BLUE, linewidth=1.8, label=label)
    steps, values = metrics.validation_loss()
    if steps:
        marks: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white", "clip_on": False, "zorder": 3}
        axes.plot(steps, values, "o", color=_ORANGE, label="validation", **marks)
    if unigram_loss is not None:
        label = f"unigram baseline {unigram_loss:.3f}"
        axes.axhline(unigram_loss, color=_MUTED, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    _legend(axes)


def _draw_kl(axes: Axes, metrics: RunMetrics) -> None:
    _panel(axes, "KL loss of the index branch", "nats")
    layers = metrics.layers("kl_per_layer")
    colours = Normalize(min(layers), max(max(layers), min(layers) + 1)) if layers else Normalize(0, 1)
    for number, series in layers.items():
        label = f"layer {number}" if len(layers) <= _MANY_LAYERS else None
        colour = _LAYERS(colours(number))
        _plot_phases(axes, metrics, series, color=colour, linewidth=0.9, label=label, smooth=True)
    total = metrics.series("kl")
    _plot_phases(axes, metrics, total, color=_INK, linewidth=0.8, alpha=0.25)
    label = "sum over layers, smoothed" if _smoothing(total[1]) else "sum over layers"
    _plot_phases(axes, metrics, total, color=_INK, linewidth=1.9, label=label, smooth=True)
    values = [*total[1], *(value for _, series in layers.values() for value in series)]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    if len(layers) > _MANY_LAYERS:
        scale = ScalarMappable(colours, _LAYERS)
        bar = axes.figure.colorbar(scale, ax=axes, pad=0.015, fraction=0.035, aspect=30)
        bar.set_label("layer", color=_MUTED)
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8.5, colors=_MUTED)
    _legend(axes)


def _draw_recall(axes: Axes, metrics: RunMetrics) -> None:
    _panel(axes, "Recall of the selection against full attention", "recall")
    for name, label, colour in (
        ("score_recall", "score recall (share of attention mass)", _GREEN),
        ("block_recall", "block recall (share of blocks)", _PURPLE),
    ):
        _plot_sampled(axes, metrics, name, colour, label)
    _share_axis(axes)
    _legend(axes, loc="lower right")


def _draw_selection(axes: Axes, metrics: RunMetrics) -> None:
    _panel(axes, "Where the index branch looks", "share of its probability")
    for name, label, colour in (
        ("local_block_share", "the query's own block", _BLUE),
        ("first_block_share", "first block of the document", _ORANGE),
    ):
        _plot_sampled(axes, metrics, name, colour, label)
    _share_axis(axes)
    _legend(axes)


def _plot_sampled(axes: Axes, metrics: RunMetrics, name: str, colour: str, label: str) -> None:
    steps, values = metrics.series(name)
    if steps:
        marker = "o" if len(steps) <= 60 else ""
        axes.plot(steps, values, color=colour, marker=marker, markersize=3.2, linewidth=1.6, label=label)


def _plot_phases(
    axes: Axes,
    metrics: RunMetrics,
    series: Series,
    *,
    label: str | None = None,
    smooth: bool = False,
    **style: Any,
) -> None:
    """One line per phase: the KL is taken over other tokens after a switch, so nothing connects the two."""
    reach = _smoothing(series[1]) if smooth else 0
    for span in metrics.phases or [PhaseSpan("", -1, sys.maxsize)]:
        part = [(step, value) for step, value in zip(*series, strict=True) if span.start < step <= span.end]
        if part:
            steps, values = zip(*part, strict=True)
            axes.plot(steps, _centred_mean(values, reach), label=label, **style)
            label = None


def _mark_phases(axes: Axes, metrics: RunMetrics) -> None:
    last = metrics.steps[-1]["iteration"]
    first = metrics.phases[0].start if metrics.phases else metrics.steps[0]["iteration"] - 1
    axes.set_xlim(first, last)
    above = axes.get_xaxis_transform()  # x in steps, y in heights of the panel
    for span in metrics.phases:
        strip, shade = _PHASES.get(span.phase, _UNKNOWN_PHASE)
        axes.axvspan(span.start, span.end, color=shade, linewidth=0, zorder=0)
        axes.axvspan(span.start, span.end, 1.0, 1.055, color=strip, linewidth=0, clip_on=False)
        name = span.phase.replace("_", " ")
        x, side = (span.start + span.end) / 2, "center"
        if span.end - span.start < 0.1 * (
            last - first
        ):  # too narrow for its name, which may run over the next
            x, name, side = span.start, f" {name}", "left"
        axes.text(x, 1.026, name, ha=side, va="center", transform=above, fontsize=8.5, color=_INK)
    for span in metrics.phases[1:]:
        axes.axvline(span.start, color=_INK, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1.5)


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=20)
    axes.set_ylabel(unit, color=_MUTED)
    axes.set_xlabel("step", color=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b5b5")


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))


def _legend(axes: Axes, loc: Literal["best", "lower right"] = "best") -> None:
    if not axes.get_legend_handles_labels()[0]:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_MUTED)
        return
    axes.legend(loc=loc, fontsize=9, framealpha=0.85, edgecolor="none", facecolor="white")


def _smoothing(values: Sequence[float]) -> int:
    """Neighbours on each side to average over: about 60 independent points remain; 0 for short runs."""
    return len(values) // 120


def _centred_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over ``reach`` values on each side; near the ends over fewer, the same number on both sides.

    It neither lags nor bends at the ends.
    """
    means = []
    for n in range(len(values)):
        r = min(reach, n, len(values) - 1 - n)
        means.append(math.fsum(values[n - r : n + r + 1]) / (2 * r + 1))
    return means


def _summary(metrics: RunMetrics) -> str:
    """The run in one line: its length and the last value of each figure."""
    last = metrics.steps[-1]
    parts = [f"step {last['iteration']:,}"]
    if isinstance(last.get("tokens"), int):
        parts.append(f"{last['tokens']:,} tokens")
    for label, (_, values) in (
        ("train loss", metrics.series("lm_loss")),
        ("validation loss", metrics.validation_loss()),
        ("KL", metrics.series("kl")),
        ("score recall", metrics.series("score_recall")),
        ("block recall", metrics.series("block_recall")),
    ):
        if values:
            parts.append(f"last {label} {values[-1]:.3f}")
    return "  ·  ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Command line of tools/plot_curves.py; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw the curves of a training run from its metrics JSONL.")
    parser.add_argument("metrics", type=Path, help="the run's metrics.jsonl")
    parser.add_argument("--output", type=Path, help="PNG to write (default: curves.png beside the metrics)")
    parser.add_argument("--title", help="headline (default: the name of the run's directory)")
    parser.add_argument("--unigram-loss", type=float, help="baseline to draw, in nats per token")
    args = parser.parse_args(argv)
    output = args.output or args.metrics.with_name("curves.png")
    try:
        metrics = load_metrics(args.metrics)
        title = args.title or args.metrics.resolve().parent.name
        draw_curves(metrics, output, title=title, unigram_loss=args.unigram_loss)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if metrics.skipped_lines:
        print(f"warning: skipped {metrics.skipped_lines} unreadable lines of {args.metrics}", file=sys.stderr)
    print(f"wrote {output}")
    return 0
