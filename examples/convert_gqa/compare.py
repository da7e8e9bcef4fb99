"""Compare conversions of one dense model: curves.png and summary.json from the metrics of their runs.

    python examples/convert_gqa/compare.py runs/convert_gqa        (what run_tiny.sh ends with)

Exits with status 1 if the loss right after a conversion is not that of the dense model.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megatron_msa.training.curves import RunMetrics, load_metrics

METHODS = {"random": "#d9730d", "mean": "#2a8c5a", "low_rank": "#1f5fa8"}
DENSE = "#6b6b6b"


def main(folder: Path) -> int:
    dense = load_metrics(folder / "dense_continued.jsonl")
    runs = {method: load_metrics(folder / f"{method}.jsonl") for method in METHODS}
    summary = {
        "dense_loss_first_step": dense.steps[0]["lm_loss"],
        "dense_validation_loss_last": dense.validations[-1]["lm_loss"],
        "conversions": {method: summarise(run, dense) for method, run in runs.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    draw(runs, dense, folder / "curves.png")
    equal = [entry["loss_equals_dense"] for entry in summary["conversions"].values()]
    return 0 if all(equal) else 1


def summarise(run: RunMetrics, dense: RunMetrics) -> dict[str, Any]:
    """What one conversion did; losses in nats per token, ``excess`` relative to the dense model continued."""
    warmup = [row for row in run.steps if row["phase"] == "warmup"]
    sparse = [row for row in run.steps if row["phase"] == "sparse"]
    recall = [row["score_recall"] for row in run.steps if "score_recall" in row]
    validation = {row["iteration"]: row["lm_loss"] for row in run.validations}
    reference = {row["iteration"]: row["lm_loss"] for row in dense.validations}
    return {
        "loss_equals_dense": run.steps[0]["lm_loss"] == dense.steps[0]["lm_loss"],
        "kl_first": warmup[0]["kl"],
        "kl_end_of_warmup": warmup[-1]["kl"],
        "kl_last": sparse[-1]["kl"],
        "score_recall_first": recall[0],
        "score_recall_last": recall[-1],
        "validation_excess": {step: loss / reference[step] - 1 for step, loss in validation.items()},
    }


def draw(runs: dict[str, RunMetrics], dense: RunMetrics, path: Path) -> None:
    figure = Figure(figsize=(13.5, 4.4), dpi=130, layout="constrained")
    kl, recall, loss = figure.subplots(1, 3)
    reference = {row["iteration"]: row["lm_loss"] for row in dense.validations}
    for method, colour in METHODS.items():
        run = runs[method]
        kl.plot(*run.series("kl"), color=colour, label=method)
        recall.plot(*run.series("score_recall"), color=colour, label=method)
        steps, values = run.validation_loss()
        excess = [100 * (value / reference[step] - 1) for step, value in zip(steps, values, strict=True)]
        loss.plot(steps, excess, "o-", color=colour, label=method)
    loss.axhline(0, color=DENSE, linestyle="--", label="dense, continued")
    loss.set_ylim(-1, 1)
    switch = next(span.start for span in runs["random"].phases if span.phase == "sparse")
    for axes, title, unit in (
        (kl, "KL of the index branch, sum over layers", "nats"),
        (recall, "Score recall of the selection", "share of attention mass"),
        (loss, "Validation loss against dense, continued", "%"),
    ):
        finish(axes, title, unit, switch)
    kl.set_yscale("log")
    kl.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    kl.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.savefig(path)


def finish(axes: Axes, title: str, unit: str, switch: int) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step (warmup | sparse)")
    axes.set_ylabel(unit)
    axes.axvline(switch, color="#222222", linewidth=1, linestyle=(0, (2, 2)))
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
