"""Train a tiny MSA MoE on real text, on any machine, and draw what happened.

    python tools/demo.py --output runs/demo          (what `make demo` runs)

The text is the source code of this Python's standard library. Training goes through the dense-attention
warmup of the index branch into sparse attention. Leaves in the output folder: curves.png, summary.json,
metrics.jsonl, train.log and a checkpoint that `examples/tiny/pretrain.sh --load` continues from.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from itertools import islice
from pathlib import Path

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training.shown_run import shown_run  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
VALIDATION_EVERY = 20  # every 20th document is kept for validation


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--train-iters", type=int, default=300)
    parser.add_argument("--warmup-iters", type=int, default=120, help="iterations before the sparse phase")
    options = parser.parse_args()
    started = time.monotonic()

    output: Path = options.output.resolve()
    for old in ("data", "checkpoints"):
        shutil.rmtree(output / old, ignore_errors=True)
    for appended in ("metrics.jsonl", "train.log"):
        (output / appended).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)

    print("1/3  text: the source code of this Python's standard library, as bytes", flush=True)
    unigram = prepare_data(output / "data")
    print(
        f"     unigram baseline {unigram:.3f} nats a byte: what a model without context reaches", flush=True
    )
    print("2/3  training: full attention while the index branch warms up, then sparse attention", flush=True)
    status = train(output, options.train_iters, options.warmup_iters)
    if status:
        return status
    print("3/3  curves and summary", flush=True)
    summary = summarise(output, unigram, time.monotonic() - started)
    print(json.dumps(summary, indent=2))
    print(f"\nlook at {os.path.relpath(output / 'curves.png')}")
    if summary["validation_loss_last"] >= min(unigram, summary["validation_loss_first"]):
        print("the model did not beat the baseline", file=sys.stderr)
        return 1
    return 0


def prepare_data(folder: Path) -> float:
    """Write the training and validation datasets; returns the unigram baseline in nats per token."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.training.config import TokenizerConfig

    from megatron_msa.data.byte_tokenizer import BYTE_VOCAB_SIZE, write_byte_tokenizer
    from megatron_msa.data.corpus import builtin_files, iter_documents
    from megatron_msa.data.preprocess import write_dataset
    from megatron_msa.data.unigram import token_counts, unigram_cross_entropy

    logging.getLogger("megatron").setLevel(logging.WARNING)  # it reports every step of reading an index
    tokenizer = write_byte_tokenizer(folder / "byte_tokenizer")
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer))
    documents = list(iter_documents(builtin_files()))
    validation = list(islice(documents, 0, None, VALIDATION_EVERY))
    training = [document for number, document in enumerate(documents) if number % VALIDATION_EVERY]
    counts = []
    for name, part in (("train", training), ("valid", validation)):
        prefix = str(folder / name)
        write_dataset(part, prefix, tokenizer_config=config, show_progress=False)
        tokens = IndexedDataset(prefix)
        counts.append(sum(token_counts(tokens[i], BYTE_VOCAB_SIZE) for i in range(len(tokens))))
    return unigram_cross_entropy(*counts)


def train(output: Path, train_iters: int, warmup_iters: int) -> int:
    """Run the example script, show its step lines, keep everything in train.log; returns its exit status."""
    command = [
        "bash",
        str(REPOSITORY / "examples/tiny/pretrain.sh"),
        *("--tokenizer-model", str(output / "data/byte_tokenizer")),
        *("--train-data-path", str(output / "data/train"), "--valid-data-path", str(output / "data/valid")),
        *("--train-iters", str(train_iters), "--msa-schedule", f"warmup@0,sparse@{warmup_iters}"),
        *(
            "--eval-at-start",
            "--eval-interval",
            str(max(1, train_iters // 15)),
            "--msa-quality-interval",
            "5",
        ),
        *("--log-interval", "1", "--log-line", "compact", "--metrics-file", str(output / "metrics.jsonl")),
        *("--save", str(output / "checkpoints"), "--save-interval", str(train_iters)),
    ]
    return shown_run(command, output / "train.log")


def summarise(output: Path, unigram: float, seconds: float) -> dict[str, float | int]:
    """Draw curves.png and write summary.json."""
    from megatron_msa.training.curves import draw_curves, load_metrics

    metrics = load_metrics(output / "metrics.jsonl")
    draw_curves(
        metrics, output / "curves.png", title="A tiny MSA MoE learns Python source code", unigram_loss=unigram
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    validation = [row["lm_loss"] for row in rows if row["event"] == "validation"]
    summary = {
        "validation_loss_first": validation[0],
        "validation_loss_last": validation[-1],
        "unigram_loss": unigram,
        "kl_first": steps[0]["kl"],
        "kl_last": steps[-1]["kl"],
        "score_recall_last": [row["score_recall"] for row in steps if "score_recall" in row][-1],
        "sparse_steps": sum(row["phase"] == "sparse" for row in steps),
        "seconds": round(seconds, 1),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
