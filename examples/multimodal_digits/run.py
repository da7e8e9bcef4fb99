"""A tiny model learns what photographs of digits show; its control gets the same samples without the pixels.

    pip install 'megatron-msa[examples]'
    python examples/multimodal_digits/run.py --output runs/multimodal_digits

Without a GPU and without a download. Trains both models with `pretrain_msa.py`, first on captions, then on
captions and long documents of 2, 4 and 8 images (unless --captions-only), and prints, on images that neither
has seen:

- captions: how often the digit is named right, and the perplexity of the caption with its own image and with
  another's;
- documents (a visual needle): how often the model knows behind which of the images the asked digit stands,
  with the document's own images and with those of another document.

Leaves in the output folder: result.json, result.png, the logs and metrics of both runs and their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

from megatron_msa.training import no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron's training package is imported

import figure  # noqa: E402
from samples import IMAGE_TOKEN, by_name, caption, digits, document  # noqa: E402

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from megatron_msa.data.multimodal.encode import Document  # noqa: E402
from megatron_msa.data.multimodal.format import Sample, write_dataset  # noqa: E402
from megatron_msa.data.multimodal.loaders import LoaderFactory, Place  # noqa: E402
from megatron_msa.evaluation.multimodal import (  # noqa: E402
    LETTERS,
    answer_accuracy,
    conditioned_perplexity,
    exchange_images,
)
from megatron_msa.training.shown_run import shown_run  # noqa: E402

STAGES = {0: 0.15, 2: 0.4, 4: 0.65, 8: 1.0}
"""Images of the documents (0: captions only), and the share of the iterations after which a stage ends.
Captions are learned in the first; what came of the others is in docs/experiments.md."""

BLEND = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
"""

RUNS = {"multimodal": ["--vision-mode", "train"], "control": ["--vision-mode", "none", "--multimodal-blind"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multimodal_digits"))
    parser.add_argument("--train-iters", type=int, default=800, help="of each model, all stages together")
    parser.add_argument("--captions-only", action="store_true", help="leave the long documents out")
    parser.add_argument("--documents", type=int, default=4000, help="long documents of each stage")
    parser.add_argument("--words", type=int, default=1, help="words behind each image of a long document")
    parser.add_argument("--questions", type=int, default=300, help="long documents to evaluate on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.train_iters < 4:
        parser.error(f"--train-iters is {options.train_iters}; each of the four stages needs at least one")
    options.stages = {0: 1.0} if options.captions_only else STAGES
    started = time.monotonic()

    output: Path = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    print("1/3  samples: captions and long documents of the digit photographs of scikit-learn", flush=True)
    write_samples(output, options)
    result: dict[str, Any] = {}
    for name, flags in RUNS.items():
        print(f"2/3  training: {name}", flush=True)
        status = train(output, name, flags, options)
        if status:
            return status
    print("3/3  evaluation on images held out", flush=True)
    for name in RUNS:
        result[name] = evaluate(output / name / "checkpoints", options)
    result["seconds"] = round(time.monotonic() - started)
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    figure.draw(output, result)
    print(figure.table(result))
    print(f"\nlook at {os.path.relpath(output / 'result.png')}")
    return 0


def write_samples(output: Path, options: argparse.Namespace) -> None:
    """Shards and the tokenizer: bytes and the image placeholder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_byte_tokenizer(output / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.save_pretrained(output / "tokenizer")
    rng = random.Random(options.seed)
    found = dict(zip(("train", "val"), digits(), strict=True))
    captions = {
        part: [caption(f"{part}-{number}", digit) for number, digit in enumerate(each)]
        for part, each in found.items()
    }
    write_dataset(output / "data/captions", captions, samples_per_shard=500)
    grouped = {part: by_name(each) for part, each in found.items()}
    for images in options.stages:
        paths = ["captions"]
        if images:
            paths.append(f"documents{images}")
            shape = {"images": images, "words": options.words, "questions": 8}
            counts = {"train": options.documents, "val": 50}
            documents = {
                part: [document(f"{part}-{number}", grouped[part], rng, **shape) for number in range(count)]
                for part, count in counts.items()
            }
            write_dataset(output / "data" / paths[-1], documents, samples_per_shard=500)
        blend = "".join(f"      - {{weight: 1, path: {path}}}\n" for path in paths)
        parts = "".join(f"  {part}:\n    blend:\n{blend}" for part in found)
        (output / f"data/stage{images}.yaml").write_text(BLEND + parts)


def train(output: Path, name: str, flags: list[str], options: argparse.Namespace) -> int:
    """Run pretrain_msa.py, once for each stage; returns the exit status of the last run."""
    iterations: int = options.train_iters
    folder = output / name
    folder.mkdir(parents=True)
    checkpoints = str(folder / "checkpoints")
    command = [
        "bash",
        str(Path(__file__).with_name("pretrain.sh")),
        *("--tokenizer-model", str(output / "tokenizer")),
        *("--train-iters", str(iterations), "--msa-schedule", f"warmup@0,sparse@{iterations // 2}"),
        *("--lr-warmup-iters", str(min(20, iterations // 4))),
        *("--eval-interval", str(max(1, iterations // 4)), "--metrics-file", str(folder / "metrics.jsonl")),
        *("--save", checkpoints, "--save-interval", str(iterations), *flags),
    ]
    for images, share in options.stages.items():
        data = ["--multimodal-data-path", str(output / f"data/stage{images}.yaml")]
        # The stages share optimizer and learning-rate schedule; only the data begins anew.
        going_on = ["--load", checkpoints, "--multimodal-restart"] if images else []
        end = ["--exit-interval", str(round(share * iterations))]
        status = shown_run([*command, *data, *going_on, *end], folder / "train.log")
        if status:
            return status
    return 0


def evaluate(checkpoints: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies and perplexities of one model on images held out."""
    from megatron_msa.inference.loading import load, tokenizer_for
    from megatron_msa.inference.processes import process_groups

    rng = random.Random(options.seed + 1)
    held_out = digits()[1]
    grouped = by_name(held_out)
    with process_groups():
        loaded = load(checkpoints)
        model, args = loaded.model, loaded.args
        encoder = LoaderFactory(args, tokenizer_for(args), Place(rank=0, ranks=1)).encoder

        def encode(sample: Sample) -> Document:
            measured = encoder.measure(sample)
            return encoder.without_pixels(measured) if args.multimodal_blind else encoder.decode(measured)

        captions = [encode(caption(str(number), digit)) for number, digit in enumerate(held_out)]
        result: dict[str, Any] = {
            "caption_accuracy": answer_accuracy(model, captions, [ord(name) for name in "0123456789"]),
            "documents": {},
        }
        for images in filter(None, options.stages):
            shape = {"images": images, "words": options.words, "questions": 1}
            documents = [
                encode(document(str(number), grouped, rng, **shape)) for number in range(options.questions)
            ]
            letters = [ord(letter) for letter in LETTERS[:images]]
            found = {
                "tokens": sum(len(each.tokens) for each in documents) / len(documents),
                "chance": 1 / images,
                "accuracy": answer_accuracy(model, documents, letters),
            }
            if not args.multimodal_blind:
                others = [wrong for _, wrong in exchange_images(documents)]
                found["others_images"] = answer_accuracy(model, others, letters)
            result["documents"][str(images)] = found
        if not args.multimodal_blind:
            perplexity = conditioned_perplexity(model, captions, [args.vision_image_token_id])
            result |= {"own_images": perplexity.own, "shuffled_images": perplexity.shuffled}
        return result


if __name__ == "__main__":
    sys.exit(main())
