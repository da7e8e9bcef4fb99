"""Checks of the data before any process group starts, so that a bad path costs a second and not a job."""

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, get_bin_path, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split

from megatron_msa.data.batch import BatchSettings
from megatron_msa.data.metadata import (
    DatasetMeta,
    load_tokenizer,
    tokenizer_config_from_args,
    tokenizer_fingerprint,
)
from megatron_msa.data.multimodal.checks import check_multimodal_data
from megatron_msa.errors import ConfigError

# Megatron's default when --data-path is given without --split.
_DEFAULT_SPLIT = "969, 30, 1"
# Without a sidecar, this many tokens at the front of the .bin are compared with the vocabulary.
_SAMPLED_TOKENS = 1 << 20
# The .idx file after the magic bytes: version, dtype code, sequences, document boundaries.
_HEADER = struct.Struct("<QBQQ")


@dataclass(frozen=True)
class IndexSummary:
    """The size of a `.bin/.idx` dataset, read from a few bytes of the index whatever its length."""

    prefix: str
    dtype: type[numpy.number]
    documents: int
    tokens: int
    starts: numpy.ndarray
    """Byte offset of each document in the .bin file, [documents] int64, memory-mapped."""

    def tokens_between(self, begin: int, end: int) -> int:
        """Tokens in documents begin..end-1."""
        if begin >= end:
            return 0
        size = DType.size(self.dtype)
        first = int(self.starts[begin]) // size
        return (int(self.starts[end]) // size if end < self.documents else self.tokens) - first


def read_index(prefix: str) -> IndexSummary:
    """Read and check the files of one dataset.

    Raises:
        ConfigError: a file is missing, is not an index, is truncated, or the dataset holds no token.
    """
    idx, bin_ = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    for path in (bin_, idx):
        if not path.is_file():
            raise ConfigError(f"{path} does not exist{_prefix_hint(prefix)}")
    idx_size, bin_size = idx.stat().st_size, bin_.stat().st_size
    rewrite = "Copy it again, or write it again with tools/preprocess_data.py."
    with idx.open("rb") as stream:
        magic = stream.read(len(_INDEX_HEADER))
        header = stream.read(_HEADER.size)
    if magic != _INDEX_HEADER:
        raise ConfigError(
            f"{idx} is not a Megatron index: it starts with {magic!r}, not {_INDEX_HEADER!r}. {rewrite}"
        )
    if len(header) < _HEADER.size:
        raise ConfigError(f"{idx} is truncated: {idx_size} bytes do not hold the header. {rewrite}")
    version, code, count, boundaries = _HEADER.unpack(header)
    if version != 1:
        raise ConfigError(f"{idx} has index version {version}; Megatron reads version 1.")
    try:
        dtype = DType.dtype_from_code(code)
    except ValueError as error:
        raise ConfigError(
            f"{idx} names token type {code}, which Megatron does not know. {rewrite}"
        ) from error

    offset = len(_INDEX_HEADER) + _HEADER.size
    expected = offset + 4 * count + 8 * count + 8 * boundaries
    if idx_size not in (expected, expected + count):  # one more byte per sequence in multimodal indices
        raise ConfigError(
            f"{idx} has {idx_size} bytes where its header asks for {expected}: truncated. {rewrite}"
        )
    if count == 0:
        raise ConfigError(f"dataset {prefix} holds no document. Preprocess text into it first.")
    lengths = numpy.memmap(idx, dtype=numpy.int32, mode="r", offset=offset, shape=(count,))
    starts = numpy.memmap(idx, dtype=numpy.int64, mode="r", offset=offset + 4 * count, shape=(count,))
    token_bytes = int(starts[-1]) + int(lengths[-1]) * DType.size(dtype)
    if bin_size != token_bytes:
        raise ConfigError(
            f"{bin_} has {bin_size} bytes where the index describes {token_bytes}: the file is truncated or "
            f"belongs to another index. {rewrite}"
        )
    if token_bytes == 0:
        raise ConfigError(f"dataset {prefix} holds no token. Preprocess text into it first.")
    return IndexSummary(prefix, dtype, count, token_bytes // DType.size(dtype), starts)


def validate_data_paths(args: Any, tokenizer: Any = None) -> None:
    """Check everything about the data that can be known before training starts.

    Flags this package does not support; that there is data; each dataset's files; that every split of them
    holds enough tokens; and that the tokenizer is the one they were written with. Reads only the ends of the
    index files, so it can run in every process. Datasets in object storage (s3://, msc://) are not checked.

    Args:
        args: Megatron's arguments, after its own validation. Not changed.
        tokenizer: the tokenizer of the run; built from `args` if it is needed and not given.

    Raises:
        ConfigError: with the value got and what to change.
    """
    # Imported late: the entry may have to prepare a machine without a GPU before megatron.training loads.
    from megatron.training.utils import get_blend_and_blend_per_split

    _check_flags(args)
    BatchSettings.from_args(args)
    tokenizer_of_run = functools.cache(
        lambda: tokenizer if tokenizer is not None else load_tokenizer(tokenizer_config_from_args(args))
    )
    is_multimodal = getattr(args, "multimodal_data_path", None) is not None
    if is_multimodal:
        check_multimodal_data(args, tokenizer_of_run())
    if args.mock_data:
        return
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is None and not any(blend_per_split or []):
        if is_multimodal:
            return
        raise ConfigError(
            "no data: pass --data-path (or --train-data-path, ...), or --mock-data for generated tokens."
        )

    if blend is not None:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split or _DEFAULT_SPLIT))
        jobs = [(prefix, matrix) for prefix in blend[0]]
    else:
        jobs = [
            (prefix, [(0.0, 1.0) if split is used else None for split in Split])
            for used, split_blend in zip(Split, blend_per_split, strict=True)
            if split_blend is not None
            for prefix in split_blend[0]
        ]
    _check_validation_data(any(matrix[Split.valid.value] for _, matrix in jobs), args)
    for prefix, matrix in jobs:
        if not is_object_storage_path(prefix):
            index = read_index(prefix)
            _check_splits(index, matrix, args)
            _check_vocabulary(index, tokenizer_of_run())


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f": give the prefix without the suffix, {prefix[:-4]}."
    try:
        float(prefix)
    except ValueError:
        return ": check the path given with --data-path."
    return ": in a weighted blend every prefix needs a weight before it (--data-path 0.7 first 0.3 second)."


def _check_flags(args: Any) -> None:
    if getattr(args, "sft", False) or getattr(args, "fim_data", False):
        raise ConfigError(
            "--sft and --fim-data are not supported: this package builds pretraining datasets only."
        )
    if getattr(args, "hybrid_context_parallel", False):
        raise ConfigError("--hybrid-context-parallel is not supported: use --context-parallel-size alone.")
    if args.reset_attention_mask:
        raise ConfigError(
            "--reset-attention-mask needs a dense attention mask, which this package never builds. To keep "
            "attention inside documents use --dataloader-inter-document-masking instead."
        )


def _check_validation_data(exists: bool, args: Any) -> None:
    # Without a validation set Megatron still evaluates, and fails there, in the middle of the run.
    if _evaluates(args) and not exists:
        raise ConfigError(
            f"--eval-iters is {args.eval_iters} but there is no validation data: give validation a share "
            "with --split or a --valid-data-path, or pass --eval-iters 0."
        )


def _evaluates(args: Any) -> bool:
    return bool(args.eval_iters) or bool(args.full_validation)


def _check_splits(index: IndexSummary, matrix: list[tuple[float, float] | None], args: Any) -> None:
    needed = args.seq_length + 1  # labels are the tokens shifted by one
    if index.tokens < needed:
        raise ConfigError(
            f"dataset {index.prefix} holds {index.tokens} tokens; one sequence of --seq-length "
            f"{args.seq_length} needs {needed}. Preprocess more text or shorten the sequence."
        )
    for split in Split:
        share = matrix[split.value]
        if share is None:
            continue
        begin, end = (round(bound * index.documents) for bound in share)
        tokens = index.tokens_between(begin, end)
        drawn_from = split is Split.train or _evaluates(args)
        # Megatron repeats a split until it has enough samples: with no token at all it repeats for ever, even
        # when it is asked for none.
        if tokens == 0 or (drawn_from and tokens < needed):
            raise ConfigError(
                f"the {split.name} split of dataset {index.prefix} holds {end - begin} of its "
                f"{index.documents} documents and {tokens} tokens; one sequence needs {needed}. Give it a "
                "larger share with --split, or a share of 0 if it is not wanted."
            )


def _check_vocabulary(index: IndexSummary, tokenizer: Any) -> None:
    meta = DatasetMeta.read(index.prefix)
    if meta is None:
        sample = numpy.fromfile(get_bin_path(index.prefix), dtype=index.dtype, count=_SAMPLED_TOKENS)
        largest = int(sample.max())
        if largest >= tokenizer.vocab_size:
            raise ConfigError(
                f"vocabulary mismatch: dataset {index.prefix} holds token id {largest}, the tokenizer given "
                f"has {tokenizer.vocab_size} ids. Train with the tokenizer that wrote the dataset."
            )
        return
    if getattr(tokenizer, "library", None) == "null-text":  # --tokenizer-type NullTokenizer: a size, no text
        matches = tokenizer.vocab_size >= meta.vocab_size
    else:
        matches = tokenizer_fingerprint(tokenizer) == meta.fingerprint
    if not matches:
        written_with = " ".join(str(value) for value in meta.tokenizer.values())
        same_size = (tokenizer.vocab_size, tokenizer.eod) == (meta.vocab_size, meta.eod)
        raise ConfigError(
            f"vocabulary mismatch: dataset {index.prefix} was written with {written_with} ({meta.vocab_size} "
            f"ids, end of document {meta.eod}); the tokenizer given has {tokenizer.vocab_size} ids, end of "
            f"document {tokenizer.eod}{', but splits text differently' if same_size else ''}. Train with the "
            "tokenizer that wrote the dataset, or preprocess the text again."
        )
