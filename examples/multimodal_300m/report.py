"""What the metrics of the runs say: speed with and without images, the encoder's share, losses.

    python examples/multimodal_300m/report.py docs/results/multimodal_300m

prints the table again and draws result.png from the metrics in that folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_msa.training.curves import RunMetrics, load_metrics

RUNS = ("mixed", "text", "large", "frozen")
SETTLING = 5
"""First sparse steps that are not timed: kernels are compiled in them."""
ENDS = 10
"""Steps of the same kind whose losses are averaged at either end of a run."""

Row = dict[str, Any]


def result(folder: Path) -> dict[str, Any]:
    """Figures of the runs whose metrics are in the folder."""
    return {name: _run(metrics) for name, metrics in _runs(folder).items()}


def _runs(folder: Path) -> dict[str, RunMetrics]:
    files = {name: folder / f"{name}.jsonl" for name in RUNS}
    return {name: load_metrics(file) for name, file in files.items() if file.exists()}


def _run(metrics: RunMetrics) -> dict[str, Any]:
    steps = metrics.steps
    # The measurement of the selection, in some steps, is not training.
    timed = [row for row in steps if row["phase"] == "sparse"][SETTLING:]
    timed = [row for row in timed if "score_recall" not in row]
    figures: dict[str, Any] = {
        "steps": len(steps),
        "sequence": steps[0]["tokens"],
        "all_losses_finite": all(row["lm_loss"] is not None for row in steps),
        "validation_loss": next((row["lm_loss"] for row in metrics.validations), None),
        "skipped_samples": sum(row.get("data", {}).get("skipped_samples", 0) for row in steps),
        "peak_memory_gib": steps[-1].get("peak_memory_gib"),
        "mixed": _speed(timed),
    }
    for kind, with_images in (("images", True), ("text", False)):
        figures[kind] = _speed([row for row in timed if _has_images(row) == with_images])
        losses = [row["lm_loss"] for row in steps if _has_images(row) == with_images]
        if losses:
            figures[kind] |= {"losses": [_mean(losses[:ENDS]), _mean(losses[-ENDS:])]}
    return figures


def _has_images(row: Row) -> bool:
    return row.get("data", {}).get("visuals", 0) > 0


def _speed(steps: Sequence[Row]) -> dict[str, Any]:
    """Of steps of one sequence each."""
    if not steps:
        return {}
    seconds = [row["seconds"] for row in steps]
    sequence = steps[0]["seconds"] * steps[0]["tokens_per_second"]
    tokens = sequence * len(steps)
    figures = {
        "timed_steps": len(steps),
        "median_seconds": statistics.median(seconds),
        "tokens_per_second": sequence / statistics.median(seconds),
        "mean_tokens_per_second": tokens / sum(seconds),
    }
    for name in ("visuals", "visual_tokens", "padding_tokens"):
        figures[name] = sum(row.get("data", {}).get(name, 0) for row in steps)
    figures["visual_share"] = figures["visual_tokens"] / tokens
    if "encoder_seconds" in steps[0]:
        encoder = [row["encoder_seconds"] for row in steps]
        figures["mean_encoder_seconds"] = statistics.fmean(encoder)
        figures["encoder_share"] = sum(encoder) / sum(seconds)
    return figures


def _mean(values: Sequence[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def table(found: dict[str, Any]) -> str:
    """The figures in lines."""
    lines = [
        f"{'run':<8}{'sequences':<10}{'steps':>6}{'visual':>8}{'step':>9}{'tokens/s':>10}{'encoder':>10}"
        f"{'share':>7}   loss"
    ]
    for name in filter(found.__contains__, RUNS):
        for kind in ("mixed", "images", "text"):
            figures = found[name][kind]
            if "timed_steps" not in figures or (kind == "mixed" and not found[name]["images"]):
                continue
            encoder = "".rjust(17)
            if "encoder_share" in figures:
                encoder = f"{figures['mean_encoder_seconds']:>8.3f} s{figures['encoder_share']:>7.1%}"
            speed = figures["mean_tokens_per_second" if kind == "mixed" else "tokens_per_second"]
            losses = "{:.3f} -> {:.3f}".format(*figures["losses"]) if "losses" in figures else ""
            lines.append(
                f"{name:<8}{kind:<10}{figures['timed_steps']:>6}{figures['visual_share']:>8.1%}"
                f"{figures['median_seconds']:>7.3f} s{speed:>10,.0f}{encoder}   {losses}"
            )
    for name in filter(found.__contains__, RUNS):
        figures = found[name]
        lines.append(
            f"{name}: {figures['skipped_samples']} samples skipped, validation {figures['validation_loss']}, "
            f"peak {figures['peak_memory_gib']} GiB, losses finite: {figures['all_losses_finite']}"
        )
    if captions := found.get("captions"):
        lines.append(
            f"captions: perplexity {captions['own']:.3f} with their own images, {captions['shuffled']:.3f} "
            f"with others' ({captions['tokens']} tokens)"
        )
    return "\n".join(lines)


def draw(folder: Path) -> None:
    """result.png: losses and seconds of the steps, with images and without, and those of the encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = {"mixed": "#0072B2", "text": "#D55E00", "large": "#009E73", "frozen": "#CC79A7"}
    for name, metrics in _runs(folder).items():
        for with_images, style in ((True, "-"), (False, ":")):
            chosen = [row for row in metrics.steps if _has_images(row) == with_images]
            sparse = [row for row in chosen if row["phase"] == "sparse"][SETTLING:]
            if not sparse:
                continue
            look = {"linestyle": style, "color": colours[name]}
            label = f"{name}, {'with images' if with_images else 'text'}"
            # The text run takes every other sequence of the mixed one.
            scale = 2 if name == "text" else 1
            x = [scale * row["iteration"] for row in chosen]
            losses.plot(x, [row["lm_loss"] for row in chosen], label=label, **look)
            x = [scale * row["iteration"] for row in sparse]
            times.plot(x, [row["seconds"] for row in sparse], **look)
            if with_images:
                encoder = [row["encoder_seconds"] for row in sparse]
                times.fill_between(x, encoder, color=colours[name], alpha=0.3, linewidth=0)
    losses.set(xlabel="sequences of the mixed stream", ylabel="loss (nats per byte of text)")
    losses.legend(frameon=False)
    times.set(xlabel="sequences of the mixed stream", ylabel="seconds of a sparse step (filled: encoder)")
    times.set_ylim(bottom=0)
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "result.png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    shown = Path(sys.argv[1])
    draw(shown)
    print(table(json.loads((shown / "result.json").read_text()) | result(shown)))
