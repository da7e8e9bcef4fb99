"""Pictures of a report: needle heatmaps, recall by length, loss by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from megatron_msa.evaluation.plan import ATTENTION_MODES, PERPLEXITY, SELECTION
from megatron_msa.evaluation.report import Results, mean_score

_INK, _MUTED, _GRID = "#222222", "#6b6b6b", "#e3e3e3"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#1f5fa8", "#d9730d", "#2a8c5a", "#7a4fa3"
_NAMES = {"msa": "MSA", "dense": "dense attention"}
_SCORES: Colormap = LinearSegmentedColormap.from_list("scores", ["#a8322d", "#f2c65a", "#2a8c5a"])
_LAYERS: Colormap = LinearSegmentedColormap.from_list("layers", ["#f2b134", "#c8553d", "#5b2a6f"])
_MOST_NUMBERS = 150
"""Cells of a heatmap up to which each shows its number."""


def draw_all(folder: Path, results: Results, *, title: str, methods: Sequence[str]) -> list[Path]:
    """Draw what there are cells for; returns the files."""
    results = {cell: result for cell, result in results.items() if "skipped" not in result}
    files = []
    for method in methods:
        if any(
            cell.task == "needle" and mean_score(result, method) is not None
            for cell, result in results.items()
        ):
            files.append(folder / (f"needle_{method}.png"))
            draw_heatmaps(files[-1], results, title=title, method=method)
    if any(cell.task == SELECTION for cell in results):
        files.append(folder / "recall_by_length.png")
        draw_recall(files[-1], results, title=title)
    if any(cell.task == PERPLEXITY for cell in results):
        files.append(folder / "perplexity_by_position.png")
        draw_perplexity(files[-1], results, title=title)
    return files


def draw_heatmaps(path: Path, results: Results, *, title: str, method: str) -> None:
    """Needle scores over length (x) and depth (y), one panel per attention mode; the scale is always 0 to
    1."""
    scores = {
        cell: score
        for cell, result in results.items()
        if cell.task == "needle" and (score := mean_score(result, method)) is not None
    }
    modes = [mode for mode in ATTENTION_MODES if any(cell.attention == mode for cell in scores)]
    lengths = sorted({cell.length for cell in scores})
    depths = sorted({cell.depth for cell in scores if cell.depth is not None})
    width = 1.8 + len(modes) * max(3.2, 0.62 * len(lengths) + 1.0)
    figure = _figure(width, max(3.4, 0.36 * len(depths) + 1.9))
    panels = np.atleast_1d(figure.subplots(1, len(modes), sharey=True))
    for axes, mode in zip(panels, modes, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell, score in scores.items():
            if cell.attention == mode and cell.depth is not None:
                grid[depths.index(cell.depth), lengths.index(cell.length)] = score
        _heatmap(axes, grid, lengths, depths)
        mean = f"mean {np.nanmean(grid):.3f}"
        # A control beside MSA has its weights; a dense model stands for itself.
        weights = ", same weights" if mode == "dense" and len(modes) > 1 else ""
        axes.set_title(
            f"{_NAMES[mode]}{weights}   {mean}", loc="left", fontsize=11, fontweight="bold", color=_INK
        )
    panels[0].set_ylabel("depth of the needle", color=_MUTED)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _SCORES), ax=list(panels), pad=0.015, fraction=0.05)
    bar.set_label(f"score ({method.replace('_', ' ')})", color=_MUTED)
    bar.outline.set_visible(False)
    samples = max(len(result["scores"][method]) for cell, result in results.items() if cell in scores)
    _finish(
        figure, path, f"{title}: needle in a haystack", f"{samples} samples per cell · missing cells are grey"
    )


def _heatmap(axes: Axes, grid: Any, lengths: Sequence[int], depths: Sequence[float]) -> None:
    axes.set_facecolor("#d5d8dc")
    axes.imshow(grid, cmap=_SCORES, norm=Normalize(0, 1), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("context length, tokens", color=_MUTED)
    axes.tick_params(colors=_MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.4)
    axes.tick_params(which="minor", length=0)
    if grid.size <= _MOST_NUMBERS:
        for (row, column), score in np.ndenumerate(grid):
            if not np.isnan(score):
                colour = _INK if 0.25 < score < 0.85 else "white"
                axes.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=8, color=colour)


def draw_recall(path: Path, results: Results, *, title: str) -> None:
    """Score recall and block recall of the selection by length: the mean, and each layer."""
    cells = sorted((cell, result) for cell, result in results.items() if cell.task == SELECTION)
    figure = _figure(11.5, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label, colour in zip(
        panels,
        ("score_recall", "block_recall"),
        ("Score recall: share of attention mass", "Block recall: share of blocks"),
        (_GREEN, _PURPLE),
        strict=True,
    ):
        _panel(axes, label, "context length, tokens", "recall")
        layers = sorted({int(n) for _, result in cells for n in result["per_layer"].get(name, {})})
        shades = Normalize(min(layers, default=1), max([*layers, 2]))
        for layer in layers:
            points = [
                (cell.length, result["per_layer"][name][str(layer)])
                for cell, result in cells
                if str(layer) in result["per_layer"].get(name, {})
            ]
            entry = f"layer {layer}" if len(layers) <= 6 else None
            axes.plot(*zip(*points, strict=True), color=_LAYERS(shades(layer)), linewidth=0.9, label=entry)
        mean = [(cell.length, result[name]) for cell, result in cells if result[name] is not None]
        if mean:
            axes.plot(*zip(*mean, strict=True), "o-", color=colour, linewidth=2.2, markersize=5, label="mean")
            axes.legend(fontsize=8.5, framealpha=0.85, edgecolor="none", loc="lower left")
        else:
            axes.text(
                0.5, 0.5, "no row saw more than k blocks", transform=axes.transAxes, ha="center", color=_MUTED
            )
        _length_axis(axes, [cell.length for cell, _ in cells])
        axes.set_ylim(0, 1)
    _finish(figure, path, f"{title}: selection against full attention", "rows that see more than k blocks")


def draw_perplexity(path: Path, results: Results, *, title: str) -> None:
    """Loss in bins of the position, one line per length and attention mode."""
    cells = sorted((cell, result) for cell, result in results.items() if cell.task == PERPLEXITY)
    lengths = sorted({cell.length for cell, _ in cells})
    shades = Normalize(-0.5, max(len(lengths) - 1, 1))
    figure = _figure(8.5, 4.6)
    axes = figure.subplots()
    _panel(axes, "Loss by position", "position in the text, tokens", "nats per token")
    for cell, result in cells:
        style = "-" if cell.attention == "msa" else (0, (4, 2))
        colour = _LAYERS(shades(lengths.index(cell.length)))
        label = f"{cell.length:,} {'MSA' if cell.attention == 'msa' else 'dense'}"
        axes.plot(
            result["bin_ends"], result["loss"], linestyle=style, color=colour, linewidth=1.6, label=label
        )
    _length_axis(axes, lengths)
    axes.legend(fontsize=8.5, framealpha=0.85, edgecolor="none", ncols=2)
    _finish(figure, path, f"{title}: loss by position", "mean over texts, 16 bins")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def _panel(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(x, color=_MUTED)
    axes.set_ylabel(y, color=_MUTED)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b5b5")


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: _short(int(length))))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(lengths) <= 12:
        axes.set_xticks(sorted(set(lengths)))


def _finish(figure: Figure, path: Path, title: str, note: str) -> None:
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=9, color=_MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _short(length: int) -> str:
    """131072 -> 128K; what is no multiple of 1024 stays as it is."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"
