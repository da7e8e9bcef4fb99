"""The plot: speedup over the best dense kernel against the context length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.summary import PATTERN, Missing, best_dense

CURVES = {
    "prefill": ("forward: select + attend", "#1f6fb2", "o"),
    "train": ("forward + backward with KL", "#c4501b", "s"),
}


def speedups(rows: Iterable[Row], op: str) -> dict[int, float]:
    """Tokens -> dense time / our time, with the selection of block_select."""
    rows = [row for row in rows if row.passed and row.group == "context" and row.op == op]
    found = {}
    for row in rows:
        if row.is_ours and row.pattern == PATTERN:
            try:
                found[row.queries] = (best_dense(rows, op, row.shape).ms or 0) / (row.ms or 1)
            except Missing:
                continue
    return dict(sorted(found.items()))


def draw(rows: Iterable[Row], path: Path) -> bool:
    """Writes a PNG; False if no row can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(rows)
    curves = {op: points for op in CURVES if (points := speedups(rows, op))}
    if not curves:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.8), dpi=150)
    for op, points in curves.items():
        label, colour, marker = CURVES[op]
        axes.plot(list(points), list(points.values()), marker=marker, color=colour, label=label, linewidth=2)
        for tokens, value in points.items():
            others = [curve[tokens] for name, curve in curves.items() if name != op and tokens in curve]
            above = all(value >= other for other in others)
            axes.annotate(
                f"{value:.1f}x",
                (tokens, value),
                textcoords="offset points",
                xytext=(0, 8 if above else -15),
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    ticks = sorted({tokens for points in curves.values() for tokens in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(
        ticks, [f"{tokens // 1024}K" if 1024 <= tokens < 2**20 else _millions(tokens) for tokens in ticks]
    )
    values = [value for points in curves.values() for value in points.values()]
    y_ticks = [2.0**power for power in range(-4, 7) if min(0.5, *values) / 2 <= 2.0**power <= max(values) * 2]
    axes.set_yticks(y_ticks, [f"{tick:g}x" for tick in y_ticks])
    axes.set_ylim(y_ticks[0], max(y_ticks[-1], 1.4 * max(values)))  # with room for the highest label
    axes.minorticks_off()
    axes.text(ticks[-1], 1.04, "dense = 1", ha="right", va="bottom", fontsize=9)
    axes.grid(True, linewidth=0.4, alpha=0.6)
    axes.set_xlabel("context, tokens (one document)")
    axes.set_ylabel("times faster than the best dense kernel")
    dense = sorted(
        {row.candidate for row in rows if row.passed and row.group == "context" and not row.is_ours}
    )
    gpus = ", ".join(sorted({row.gpu for row in rows}))
    axes.set_title(
        f"MiniMax Sparse Attention against dense attention\n{gpus}; dense: {', '.join(dense)}", fontsize=10
    )
    axes.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _millions(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else str(tokens)
