"""The table and the figure of the example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """What both models reach, beside chance."""
    seeing, blind, chance = result["multimodal"], result["control"], result["chance"]
    lines = [
        f"{'on images held out':<40}{'multimodal':>12}{'control':>10}{'chance':>10}",
        _accuracies("digit named right in a caption", "caption", seeing, blind, chance),
        _accuracies("letter of the asked digit in a document", "document", seeing, blind, chance),
        f"perplexity of captions: {seeing['own_images']:.3f} a token with their own images, "
        f"{seeing['shuffled_images']:.3f} with others'",
        f"a document has {seeing['document_tokens']:.0f} tokens; {result['seconds']} s in all",
    ]
    return "\n".join(lines)


def _accuracies(what: str, name: str, seeing: dict, blind: dict, chance: dict) -> str:
    values = (seeing[f"{name}_accuracy"], blind[f"{name}_accuracy"], chance[name])
    return f"{what:<40}{values[0]:>12.1%}{values[1]:>10.1%}{values[2]:>10.1%}"


def draw(output: Path, result: dict[str, Any]) -> None:
    """result.png: the training losses of both models, and their accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"multimodal": "#0072B2", "control": "#D55E00"}
    figure, (losses, accuracies) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, colour in colours.items():
        rows = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["event"] == "step"]
        losses.plot([r["iteration"] for r in steps], [r["lm_loss"] for r in steps], color=colour, label=name)
        for number, task in enumerate(("caption", "document")):
            place = number + (0.2 if name == "control" else -0.2)
            value = result[name][f"{task}_accuracy"]
            accuracies.bar(place, value, 0.36, color=colour, label=name if number == 0 else None)
            accuracies.text(place, value + 0.02, f"{value:.0%}", ha="center")
    losses.set(xlabel="iteration", ylabel="loss (nats per text token)", yscale="log")
    losses.legend(frameon=False)
    for number, task in enumerate(("caption", "document")):
        chance = result["chance"][task]
        accuracies.hlines(chance, number - 0.4, number + 0.4, color="black", linestyle=":", linewidth=1)
    accuracies.set(ylabel="accuracy on images held out", ylim=(0, 1.15))
    accuracies.set_xticks([0, 1], ["digit of a caption", "place of a digit\nin a long document"])
    accuracies.legend(frameon=False, loc="upper right")
    for axes in (losses, accuracies):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output / "result.png", dpi=150)
