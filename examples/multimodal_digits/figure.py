"""The table and the figure of the example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAPTION_CHANCE = 0.1


def table(result: dict[str, Any]) -> str:
    """What both models reach, beside chance and beside the images of other documents."""
    seeing, blind = result["multimodal"], result["control"]
    lines = [
        f"{'on images held out':<44}{'multimodal':>12}{'control':>10}{'wrong images':>14}{'chance':>9}",
        _row(
            "digit named right in a caption",
            seeing["caption_accuracy"],
            blind["caption_accuracy"],
            None,
            CAPTION_CHANCE,
        ),
    ]
    for images, found in seeing["documents"].items():
        control = blind["documents"][images]["accuracy"]
        what = f"image of the asked digit, of {images} in {found['tokens']:.0f} tokens"
        lines.append(_row(what, found["accuracy"], control, found["others_images"], found["chance"]))
    lines.append(
        f"perplexity of captions: {seeing['own_images']:.3f} a token with their own images, "
        f"{seeing['shuffled_images']:.3f} with others'; {result['seconds']} s in all"
    )
    return "\n".join(lines)


def _row(what: str, seeing: float, blind: float, wrong: float | None, chance: float) -> str:
    shown = f"{'':>14}" if wrong is None else f"{wrong:>14.1%}"
    return f"{what:<44}{seeing:>12.1%}{blind:>10.1%}{shown}{chance:>9.1%}"


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
        for number, value in enumerate(_accuracies(result[name])):
            place = number + (0.2 if name == "control" else -0.2)
            accuracies.bar(place, value, 0.36, color=colour, label=name if number == 0 else None)
            accuracies.text(place, value + 0.02, f"{value:.0%}", ha="center")
    losses.set(xlabel="iteration", ylabel="loss (nats per text token)", yscale="log")
    losses.legend(frameon=False)
    documents = result["multimodal"]["documents"]
    for number, chance in enumerate([CAPTION_CHANCE, *(each["chance"] for each in documents.values())]):
        accuracies.hlines(chance, number - 0.4, number + 0.4, color="black", linestyle=":", linewidth=1)
    accuracies.set(ylabel="accuracy on images held out", ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
    names = ["digit of a\ncaption", *(f"which of\n{images} images" for images in documents)]
    accuracies.set_xticks(range(len(names)), names)
    accuracies.legend(frameon=False, loc="upper right")
    for axes in (losses, accuracies):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output / "result.png", dpi=150)


def _accuracies(model: dict[str, Any]) -> list[float]:
    return [model["caption_accuracy"], *(each["accuracy"] for each in model["documents"].values())]
