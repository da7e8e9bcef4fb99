"""A 313M language model with a vision encoder of 85M trains on a mixed stream at 8K context, and is timed.

    pip install 'megatron-msa[examples]' scikit-image
    python examples/multimodal_300m/run.py --output runs/multimodal_300m

One GPU, no download. Every other sequence is text (the standard library's sources, .bin/.idx), the others are
packed from pages of text and photographs (WebDataset shards, through Megatron-Energon). Parts, in this order:

- data: the pages, captions for the evaluation, the text, the tokenizer (bytes and the image placeholder);
- mixed: the model on the mixed stream;
- text: the same language model without an encoder, on text sequences alone;
- evaluate: perplexity of captions with their own images and with others', of the model that mixed saved;
- large: mixed, with MiniMax-M3's encoder (631M);
- frozen: mixed, with the encoder that mixed saved, frozen;
- report: results/ with the metrics of what has run, result.json and result.png.

With --tiny everything is small enough for a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(Path(__file__).resolve().parent)]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

import report  # noqa: E402
from pages import PageWriter, paragraphs, photographs  # noqa: E402

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from megatron_msa.data.multimodal.format import write_dataset  # noqa: E402
from megatron_msa.training.shown_run import shown_run  # noqa: E402

IMAGE_TOKEN = "<|image|>"
TORN_EVERY = 25
"""Of so many training pages, one has an image whose file is cut short: it must be counted and left out."""

LARGE = [
    *("--vision-num-layers", "32", "--vision-hidden-size", "1280"),
    *("--vision-ffn-hidden-size", "5120", "--vision-num-attention-heads", "16"),
]
TINY = [
    *("--num-layers", "2", "--hidden-size", "32"),
    *("--ffn-hidden-size", "64", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--kv-channels", "8"),
    *("--num-experts", "4", "--moe-ffn-hidden-size", "16"),
    *("--moe-shared-expert-intermediate-size", "16", "--moe-layer-freq", "[0,1]"),
    *("--seq-length", "1024", "--max-position-embeddings", "1024"),
    *("--msa-block-size", "32", "--msa-num-selected-blocks", "4"),
    *("--eval-iters", "2", "--num-workers", "1"),
    *("--vision-num-layers", "1", "--vision-hidden-size", "24"),
    *("--vision-ffn-hidden-size", "32", "--vision-num-attention-heads", "2"),
    *("--vision-patch-size", "4", "--multimodal-min-pixels", "64"),
    *("--multimodal-packing-buffer", "16"),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/multimodal_300m"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--train-iters",
        type=int,
        default=160,
        help="of mixed. text takes half as many, which is as many text sequences; large and frozen a "
        "quarter. The first eighth of each is the warmup phase of MSA, then it is sparse",
    )
    parser.add_argument("--pages", type=int, default=600, help="in the training data")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--flags", default="", help="further flags of pretrain_msa.py, in one string")
    parser.add_argument("--commit", help="of copies of the repository without its history")
    options = parser.parse_args()
    if options.train_iters < 16:
        parser.error(f"--train-iters is {options.train_iters}; the shortest part takes a quarter, at least 4")
    options.output = options.output.resolve()
    for name in PARTS:
        if name in options.parts:
            print(f"{name}:", flush=True)
            status = PARTS[name](options)
            if status:
                return status
    return 0


def make_data(options: argparse.Namespace) -> int:
    """Shards, captions, the tokenizer and the text."""
    from transformers import AutoTokenizer

    data: Path = options.output / "data"
    shutil.rmtree(data, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(write_byte_tokenizer(data / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.save_pretrained(data / "tokenizer")
    command = [
        *(sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "--builtin-corpus"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(data / "tokenizer")),
        *("--output-prefix", str(data / "text")),
        *(("--max-bytes", "200000") if options.tiny else ()),
    ]
    text = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # while the pages are made
    found, rng = photographs(), random.Random(1)
    writer = PageWriter(found, paragraphs(100 if options.tiny else 2000), (200, 620), (3, 6))
    if options.tiny:
        writer = PageWriter(writer.found, writer.texts, (16, 48), (1, 2))
    few = 8 if options.tiny else 96
    parts = {
        "train": writer.pages("page", options.pages, rng, torn_every=TORN_EVERY),
        "val": writer.pages("held-out", few, rng),
    }
    write_dataset(data / "pages", parts, samples_per_shard=max(1, options.pages // 12), suffix="jpg")
    captions = {"val": writer.captions("caption", few, rng)}
    write_dataset(data / "captions", captions, samples_per_shard=few, suffix="jpg")
    print(f"     {options.pages} pages with parts of {len(found)} photographs", flush=True)
    return text.wait()


def train(name: str, options: argparse.Namespace) -> int:
    """Run pretrain.sh as one of the parts."""
    iterations: int = options.train_iters
    data, folder = options.output / "data", options.output / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    multimodal = ["--multimodal-data-path", str(data / "pages"), "--log-encoder-time"]
    checkpoints = options.output / "mixed/checkpoints"
    save = ["--save", str(checkpoints), "--save-interval", str(iterations), "--no-save-optim"]
    length, flags = {
        "mixed": (iterations, [*multimodal, *save]),
        "text": (iterations // 2, ["--vision-mode", "none"]),
        "large": (iterations // 4, [*multimodal, *([] if options.tiny else LARGE)]),
        "frozen": (
            iterations // 4,
            [*multimodal, "--vision-mode", "freeze", "--vision-load", str(checkpoints)],
        ),
    }[name]
    command = [
        *("bash", str(Path(__file__).with_name("pretrain.sh"))),
        *("--data-path", str(data / "text"), "--tokenizer-model", str(data / "tokenizer")),
        *("--train-iters", str(length), "--lr-warmup-iters", str(max(1, length // 4))),
        *("--msa-schedule", f"warmup@0,sparse@{max(1, length // 8)}", "--eval-interval", str(length)),
        *("--metrics-file", str(folder / "metrics.jsonl"), "--log-line", "compact"),
        *(TINY if options.tiny else ()),
        *flags,
        *options.flags.split(),
    ]
    return shown_run(command, folder / "train.log")


def evaluate(options: argparse.Namespace) -> int:
    """The captions' perplexity."""
    command = [
        *(sys.executable, str(REPOSITORY / "tools/eval_multimodal.py")),
        *("--load", str(options.output / "mixed/checkpoints")),
        *("--data", str(options.output / "data/captions")),
        *("--output", str(options.output / "captions.json")),
    ]
    python_path = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path)}).returncode


def write_report(options: argparse.Namespace) -> int:
    """The folder of results: result.json, result.png and the metrics of what has run."""
    import torch
    from benchmarks import environment

    folder: Path = options.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name in report.RUNS:
        metrics = options.output / name / "metrics.jsonl"
        if metrics.exists():
            shutil.copyfile(metrics, folder / f"{name}.jsonl")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"environment": environment.describe(device, options.commit)} | report.result(folder)
    captions = options.output / "captions.json"
    if captions.exists():
        result["captions"] = json.loads(captions.read_text())["perplexity"] | {"data": "data/captions"}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    report.draw(folder)
    print(report.table(result))
    return 0


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "data": make_data,
    "mixed": lambda options: train("mixed", options),
    "text": lambda options: train("text", options),
    "evaluate": evaluate,
    "large": lambda options: train("large", options),
    "frozen": lambda options: train("frozen", options),
    "report": write_report,
}


if __name__ == "__main__":
    sys.exit(main())
