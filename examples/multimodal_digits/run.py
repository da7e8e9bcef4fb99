"""A tiny model learns what photographs of digits show; its control gets the same samples without the pixels.

    pip install 'megatron-msa[examples]'
    python examples/multimodal_digits/run.py --output runs/multimodal_digits

Without a GPU and without a download. Trains both models with `pretrain_msa.py` on captions and on long
documents of several images, then prints, on images that neither has seen:

- captions: how often the digit is named right, and the perplexity of the caption with its own image and with
  another's;
- documents: how often the model knows at which letter the asked digit stands.

Leaves in the output folder: result.json, result.png, the logs and metrics of both runs and their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
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
from samples import IMAGE_TOKEN, caption, digits, document  # noqa: E402

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from megatron_msa.data.multimodal.encode import Document  # noqa: E402
from megatron_msa.data.multimodal.format import Sample, write_dataset  # noqa: E402
from megatron_msa.data.multimodal.loaders import LoaderFactory, Place  # noqa: E402
from megatron_msa.evaluation.multimodal import (  # noqa: E402
    LETTERS,
    answer_accuracy,
    conditioned_perplexity,
)

# Weights are of samples; a document has about twenty times the tokens of a caption.
METADATASET = """\
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend:
      - {weight: 20, path: captions}
      - {weight: 1, path: documents}
  val:
    blend:
      - {weight: 20, path: captions}
      - {weight: 1, path: documents}
"""

RUNS = {"multimodal": ["--vision-mode", "train"], "control": ["--vision-mode", "none", "--multimodal-blind"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multimodal_digits"))
    parser.add_argument("--train-iters", type=int, default=600)
    parser.add_argument("--documents", type=int, default=1500, help="long documents to train on")
    parser.add_argument("--images", type=int, default=4, help="images of a long document")
    parser.add_argument("--words", type=int, default=2, help="words behind each image of a long document")
    parser.add_argument("--questions", type=int, default=200, help="long documents to evaluate on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()

    output: Path = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    print("1/3  samples: captions and long documents of the digit photographs of scikit-learn", flush=True)
    write_samples(output, options)
    result: dict[str, Any] = {}
    for name, flags in RUNS.items():
        print(f"2/3  training: {name}", flush=True)
        status = train(output, name, flags, options.train_iters)
        if status:
            print(
                f"training failed with status {status}; the end of {output / name}/train.log:",
                file=sys.stderr,
            )
            print("\n".join((output / name / "train.log").read_text().splitlines()[-25:]), file=sys.stderr)
            return status
    print("3/3  evaluation on images held out", flush=True)
    for name in RUNS:
        result[name] = evaluate(output / name / "checkpoints", options)
    result |= {"chance": {"caption": 0.1, "document": 1 / options.images}}
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
    training, held_out = digits()
    shape = {"images": options.images, "words": options.words, "questions": options.images}
    captions, documents = {}, {}
    for part, found, count in (("train", training, options.documents), ("val", held_out, 50)):
        captions[part] = [caption(f"{part}-{number}", digit) for number, digit in enumerate(found)]
        documents[part] = [document(f"{part}-{number}", found, rng, **shape) for number in range(count)]
    write_dataset(output / "data/captions", captions, samples_per_shard=500)
    write_dataset(output / "data/documents", documents, samples_per_shard=500)
    (output / "data/both.yaml").write_text(METADATASET)


def train(output: Path, name: str, flags: list[str], iterations: int) -> int:
    """Run pretrain_msa.py, show its step lines, keep everything in train.log; returns its exit status."""
    folder = output / name
    folder.mkdir(parents=True)
    command = [
        "bash",
        str(Path(__file__).with_name("pretrain.sh")),
        *(
            "--tokenizer-model",
            str(output / "tokenizer"),
            "--multimodal-data-path",
            str(output / "data/both.yaml"),
        ),
        *("--train-iters", str(iterations), "--msa-schedule", f"warmup@0,sparse@{iterations // 2}"),
        *("--lr-warmup-iters", str(min(20, iterations // 4))),
        *("--eval-interval", str(max(1, iterations // 4)), "--metrics-file", str(folder / "metrics.jsonl")),
        *("--save", str(folder / "checkpoints"), "--save-interval", str(iterations), *flags),
    ]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 8)))
    with (folder / "train.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.lstrip().startswith(("step", "validation", "MSA phase", "error")):
                print("     " + line.rstrip(), flush=True)
        return process.wait()


def evaluate(checkpoints: Path, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies and perplexities of one model on images held out."""
    from megatron_msa.inference.loading import load, tokenizer_for
    from megatron_msa.inference.processes import process_groups

    rng = random.Random(options.seed + 1)
    _, held_out = digits()
    with process_groups():
        loaded = load(checkpoints)
        model, args = loaded.model, loaded.args
        encoder = LoaderFactory(args, tokenizer_for(args), Place(rank=0, ranks=1)).encoder

        def encode(sample: Sample) -> Document:
            measured = encoder.measure(sample)
            return encoder.without_pixels(measured) if args.multimodal_blind else encoder.decode(measured)

        captions = [encode(caption(str(number), digit)) for number, digit in enumerate(held_out)]
        shape = {"images": options.images, "words": options.words, "questions": 1}
        documents = [
            encode(document(str(number), held_out, rng, **shape)) for number in range(options.questions)
        ]
        result = {
            "caption_accuracy": answer_accuracy(model, captions, [ord(name) for name in "0123456789"]),
            "document_accuracy": answer_accuracy(
                model, documents, [ord(letter) for letter in LETTERS[: options.images]]
            ),
            "document_tokens": sum(len(each.tokens) for each in documents) / len(documents),
        }
        if not args.multimodal_blind:
            perplexity = conditioned_perplexity(model, captions, [args.vision_image_token_id])
            result |= {"own_images": perplexity.own, "shuffled_images": perplexity.shuffled}
        return result


if __name__ == "__main__":
    sys.exit(main())
