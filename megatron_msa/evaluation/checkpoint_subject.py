"""A Megatron checkpoint as the subject of an evaluation, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.inspection import find_checkpoint
from megatron_msa.data.metadata import tokenizer_fingerprint
from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import selection, serving_cost
from megatron_msa.evaluation.protocol import LanguageModel, Tokens
from megatron_msa.evaluation.run import Subject
from megatron_msa.inference.engine import Attention, InferenceEngine
from megatron_msa.inference.loading import load, tokenizer_for

_SAMPLE = 1 << 16
"""Bytes at both ends of each file that go into the fingerprint: enough to tell weights apart, and quick."""

_ENGINE_MODES: dict[str, Attention] = {"msa": "sparse", "dense": "dense"}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See `InferenceEngine`; ``longest`` is of the sequences to come, None for the model's limit."""

    longest: int | None
    max_sequences: int
    prefill_chunk: int
    cache_dtype: torch.dtype | None
    index_key_dtype: torch.dtype | None
    position_limit: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is ready to be evaluated.

    Attributes:
        subject: for `run.evaluate`.
        settings: what identifies weights and tokenizer, for the header.
        description: for reports: name, iteration, phase.
    """

    subject: Subject
    settings: dict[str, Any]
    description: dict[str, Any]


def open_checkpoint(
    folder: Path,
    *,
    step: int | None,
    dtype: torch.dtype | None,
    tokenizer_type: str | None,
    tokenizer_model: str | None,
    options: EngineOptions,
    quality_rows: int,
    attention: Sequence[str],
) -> Checkpoint:
    """Load a checkpoint into the process groups that exist.

    Args:
        folder: --save of its training.
        step: iteration; None for the latest.
        dtype: to compute in; None for the loader's choice.
        tokenizer_type, tokenizer_model: in place of those that the checkpoint names.
        options: of the engines.
        quality_rows: query rows per layer and text that the selection is measured on.
        attention: modes that will be asked for.

    Raises:
        ConfigError: no checkpoint, another tokenizer's, or one without MSA layers for the mode "msa".
    """
    path = find_checkpoint(str(folder), step)
    loaded = load(folder, step=step, dtype=dtype)
    assert path is not None, "the loader has refused that"
    tokenizer = tokenizer_for(loaded.args, tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model)
    model = loaded.model
    has_msa = any(True for _ in msa_layers(model))
    if "msa" in attention and not has_msa:
        raise ConfigError(
            f"--attention has msa, but {path} has no MSA layer: use --attention dense, or convert it with "
            "tools/convert_checkpoint.py gqa-to-msa"
        )

    longest = options.position_limit or model.max_sequence_length

    def engine(mode: str) -> LanguageModel:
        return InferenceEngine(
            model,
            max_tokens=options.longest or longest,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            cache_dtype=options.cache_dtype,
            index_key_dtype=options.index_key_dtype,
            position_limit=options.position_limit,
            vocab_size=int(tokenizer.vocab_size),
            attention=_ENGINE_MODES[mode],
        )

    def measure_selection(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        return selection.measure(model, texts, rows=quality_rows, index_key_dtype=options.index_key_dtype)

    def serving(length: int) -> dict[str, Any]:
        return serving_cost.as_json(model.config, padded_vocab_size=model.vocab_size, length=length)

    subject = Subject(
        model=engine,
        tokens=Tokens(tokenizer),
        longest=longest,
        serving=serving,
        selection=selection.obstacle(model) or measure_selection,
    )
    settings = {
        "checkpoint_fingerprint": fingerprint(path),
        "iteration": loaded.iteration,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "dtype": _name(next(model.parameters()).dtype),
        "cache_dtype": _name(options.cache_dtype),
        "index_key_dtype": _name(options.index_key_dtype),
        "position_limit": options.position_limit,
        "quality_rows": quality_rows,
    }
    description = {
        "name": folder.resolve().name,
        "path": str(folder),
        "iteration": loaded.iteration,
        "phase": loaded.phase.value,
        "block_size": model.config.msa_block_size,
        "num_selected_blocks": model.config.msa_num_selected_blocks,
    }
    return Checkpoint(subject, settings, description)


def fingerprint(checkpoint: Path) -> str:
    """A hash of the names and sizes of a checkpoint's files and of the beginning and end of each."""
    found = hashlib.sha256()
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(checkpoint)} {size}\n".encode())
        with file.open("rb") as stream:
            found.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            found.update(stream.read(_SAMPLE))
    return found.hexdigest()[:16]


def _name(dtype: torch.dtype | None) -> str:
    return "as the model" if dtype is None else str(dtype).removeprefix("torch.")
