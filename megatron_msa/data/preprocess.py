"""Text -> Megatron's `.bin/.idx`: tokenize documents and write one dataset, whole or not at all."""

import argparse
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.config import TokenizerConfig
from tqdm import tqdm

from megatron_msa.data.byte_tokenizer import BYTE_VOCAB_SIZE, write_byte_tokenizer
from megatron_msa.data.corpus import (
    Document,
    builtin_files,
    iter_documents,
    list_input_files,
    take_bytes,
)
from megatron_msa.data.encode import Encoder
from megatron_msa.data.metadata import (
    DatasetMeta,
    load_tokenizer,
    meta_path,
    tokenizer_config_from_args,
    tokenizer_fingerprint,
    tokenizer_settings,
)
from megatron_msa.errors import ConfigError

BYTES = "bytes"
TOKENIZER_TYPES = (
    BYTES,
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "NullTokenizer",
)


def write_dataset(
    documents: Iterable[Document],
    prefix: str,
    *,
    tokenizer_config: TokenizerConfig,
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    total_bytes: int | None = None,
    show_progress: bool = True,
) -> DatasetMeta:
    """Tokenize `documents` and write `<prefix>.bin`, `<prefix>.idx` and `<prefix>.meta.json`.

    The files are written under temporary names and renamed at the end, the index last: without a complete
    `.idx` nothing can take the dataset for whole. Documents without text are left out.

    Args:
        documents: the text, in the order in which it is stored.
        prefix: output path without suffix; its directory is made if needed.
        tokenizer_config: Megatron's tokenizer settings.
        append_eod: end each document with the tokenizer's end-of-document id.
        workers: processes that tokenize.
        overwrite: replace an existing dataset; otherwise it is an error.
        total_bytes: size of the input for the progress bar, if known.
        show_progress: show the bar on stderr.

    Raises:
        ConfigError: bad input, no document with text, an existing dataset, or an unusable tokenizer.
    """
    final = {kind: Path(path) for kind, path in _paths(prefix).items()}
    existing = [str(path) for path in final.values() if path.exists()]
    if existing and not overwrite:
        raise ConfigError(
            f"{', '.join(existing)} exist already: choose another --output-prefix or pass --overwrite."
        )
    tokenizer = load_tokenizer(tokenizer_config)
    final["bin"].parent.mkdir(parents=True, exist_ok=True)
    partial = {kind: path.with_name(f"{path.name}.partial-{os.getpid()}") for kind, path in final.items()}
    try:
        with Encoder(tokenizer, append_eod=append_eod, workers=workers) as encoder:
            builder = IndexedDatasetBuilder(str(partial["bin"]), dtype=encoder.dtype)
            try:
                count, tokens = _fill(builder, encoder, documents, total_bytes, show_progress)
            finally:
                builder.data_file.close()
        if count == 0:
            raise ConfigError("no document with text in the input: nothing to write.")
        builder.finalize(str(partial["idx"]))
        meta = DatasetMeta(
            documents=count,
            tokens=tokens,
            dtype=numpy.dtype(encoder.dtype).name,
            append_eod=append_eod,
            tokenizer=tokenizer_settings(tokenizer_config),
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            fingerprint=tokenizer_fingerprint(tokenizer),
        )
        meta.write(partial["meta"])
        if existing:
            _remove_old_dataset(prefix, final)
        for kind in ("bin", "meta", "idx"):
            partial[kind].rename(final[kind])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return meta


def _paths(prefix: str) -> dict[str, str]:
    return {"bin": get_bin_path(prefix), "idx": get_idx_path(prefix), "meta": str(meta_path(prefix))}


def _remove_old_dataset(prefix: str, final: dict[str, Path]) -> None:
    # The index goes first, so that the old .idx never stands beside the new .bin.
    for kind in ("idx", "meta", "bin"):
        final[kind].unlink(missing_ok=True)
    # Megatron caches sample indices here under a key that knows the path but not the content of a dataset:
    # left in place they would cut the new tokens at the old documents.
    shutil.rmtree(Path(prefix) / "cache" / "GPTDataset_indices", ignore_errors=True)


def _fill(
    builder: IndexedDatasetBuilder,
    encoder: Encoder,
    documents: Iterable[Document],
    total_bytes: int | None,
    show_progress: bool,
) -> tuple[int, int]:
    """Write all documents; returns (documents, tokens)."""
    count = tokens = 0
    # In a log file every refresh is a new line: two a minute are enough there.
    refresh_seconds = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total_bytes,
        unit="B",
        unit_scale=True,
        desc="tokenize",
        mininterval=refresh_seconds,
        disable=not show_progress,
    ) as bar:
        for document, ids in encoder.encode_all(documents):
            if ids.size:
                builder.add_document(ids, [ids.size])
                count += 1
                tokens += ids.size
            bar.update(document.source_bytes)
    return count, tokens


def make_parser() -> argparse.ArgumentParser:
    """The command line of tools/preprocess_data.py. Tokenizer flags are Megatron's own, as in training."""
    parser = argparse.ArgumentParser(
        description="Tokenize text into Megatron's .bin/.idx format.", allow_abbrev=False
    )
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, directories or globs; .jsonl and .json files hold one JSON object a line, any other "
        "file is one document of plain text",
    )
    source.add_argument(
        "--glob", default="**/*", help="which files of a directory to take (default: %(default)s)"
    )
    source.add_argument(
        "--json-key", default="text", help="key of the text in JSON lines (default: %(default)s)"
    )
    source.add_argument(
        "--builtin-corpus",
        action="store_true",
        help="use the source code of this Python's standard library (about 10 MB) instead of --input",
    )
    source.add_argument("--max-bytes", type=int, default=None, help="stop after this many bytes of text")

    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="path of the dataset without .bin/.idx")
    output.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    output.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: on)",
    )
    output.add_argument(
        "--workers",
        type=int,
        default=min(8, len(os.sched_getaffinity(0))),
        help="processes that tokenize (default: the cores available, at most 8)",
    )

    ArgumentGroupFactory(
        TokenizerConfig, exclude=["tokenizer_type", "padded_vocab_size", "pad_vocab_size"]
    ).build_group(parser, title="tokenizer")
    parser.add_argument(
        "--tokenizer-type",
        required=True,
        choices=TOKENIZER_TYPES,
        help=f"{BYTES}: UTF-8 bytes as ids; writes that tokenizer to --tokenizer-model (default: "
        "byte_tokenizer beside the output) for training to read. The others are Megatron's.",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the preprocessor; returns the exit status."""
    args = make_parser().parse_args(argv)
    # Let SIGTERM unwind like Ctrl-C, so that the temporary files are removed.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.builtin_corpus and args.input:
            raise ConfigError("--input and --builtin-corpus are both given: choose one.")
        files = builtin_files() if args.builtin_corpus else list_input_files(args.input, args.glob)
        config = _tokenizer_config(args)
        sizes = sum(file.stat().st_size for file in files)
        meta = write_dataset(
            take_bytes(iter_documents(files, args.json_key), args.max_bytes),
            args.output_prefix,
            tokenizer_config=config,
            append_eod=args.append_eod,
            workers=args.workers,
            overwrite=args.overwrite,
            total_bytes=sizes if args.max_bytes is None else min(sizes, args.max_bytes),
        )
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "error: a worker process died, probably for lack of memory: use fewer --workers", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    _report(meta, args.output_prefix)
    return 0


def _tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    config = tokenizer_config_from_args(args)
    if args.tokenizer_type != BYTES:
        return config
    directory = args.tokenizer_model or Path(args.output_prefix).parent / "byte_tokenizer"
    config = dataclasses.replace(
        config, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(write_byte_tokenizer(directory))
    )
    tokenizer = load_tokenizer(config)
    if tokenizer.vocab_size != BYTE_VOCAB_SIZE or tokenizer.tokenize("A") != [ord("A")]:
        raise ConfigError(
            f"{directory} holds another tokenizer (vocabulary {tokenizer.vocab_size}, bytes have "
            f"{BYTE_VOCAB_SIZE}): give --tokenizer-model a new directory, or use --tokenizer-type "
            "HuggingFaceTokenizer."
        )
    return config


def _report(meta: DatasetMeta, prefix: str) -> None:
    end = "no end-of-document token" if meta.eod is None else f"end of document {meta.eod}"
    flags = f"--tokenizer-type {meta.tokenizer['tokenizer_type']}"
    if "tokenizer_model" in meta.tokenizer:
        flags += f" --tokenizer-model {meta.tokenizer['tokenizer_model']}"
    print(f"documents   {meta.documents:,}")
    print(f"tokens      {meta.tokens:,} ({meta.dtype})")
    print(f"vocabulary  {meta.vocab_size:,} ({end})")
    print(f"files       {' '.join(_paths(prefix).values())}")
    print(f"train with  {flags} --data-path {prefix}")
