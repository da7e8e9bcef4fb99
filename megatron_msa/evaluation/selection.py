"""How good the block selection is at a length: block recall and score recall against full attention, per
layer.

Both are measured by the layers themselves, as in training (`msa_kernels.selection_quality`): for evenly
spaced query rows, in chunks of rows, so that no matrix of all queries and keys is ever made. Rows that see no
more than k blocks select all of them and do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.errors import ConfigError
from megatron_msa.inference.paged_rows import as_kept
from megatron_msa.phases import Phase
from megatron_msa.training.layer_reduction import collect

RECALLS = ("block_recall", "score_recall")


def obstacle(model: GPTModel) -> str | None:
    """What keeps the selection of this model from being measured, and what to change; or None."""
    if not any(True for _ in msa_layers(model)):
        return "the checkpoint has no MSA layer; leave it out"
    size = model.config.context_parallel_size
    if size > 1:
        return (
            f"--context-parallel-size is {size}, and the selection is measured with 1; leave it out, or use "
            "tensor parallelism"
        )
    return None


@torch.no_grad()
def measure(
    model: GPTModel,
    sequences: Sequence[Sequence[int]],
    *,
    rows: int,
    index_key_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Run the model over texts with its sparse attention and measure every MSA layer.

    Args:
        model: whole layers on every rank (tensor parallelism is fine); its phase and mode are left as they
            were.
        sequences: token ids, each run by itself in one forward pass.
        rows: query rows per layer and sequence.
        index_key_dtype: in which the cache keeps index keys; None for the model's.

    Returns:
        Per recall its mean over layers, and "per_layer" by layer number from 1; None where no row saw more
        than k blocks.

    Raises:
        ConfigError: see `obstacle`.
    """
    if (reason := obstacle(model)) is not None:
        raise ConfigError(f"the selection cannot be measured: {reason}")
    config = model.config
    device = next(model.parameters()).device
    with _measuring(model, rows, index_key_dtype):
        for sequence in sequences:
            for layer in msa_layers(model):
                layer.sample_quality = True
            tokens = torch.tensor([list(sequence)], device=device)
            model(tokens, torch.arange(tokens.shape[1], device=device)[None], None)
        found = collect([model], num_decoder_layers=config.num_layers, num_mtp_layers=0, device=device)
    result: dict[str, Any] = {"sequences": len(sequences), "rows": rows, "per_layer": {}}
    for name in RECALLS:
        layers = found.get(name, {})
        result[name] = sum(layers.values()) / len(layers) if layers else None
        result["per_layer"][name] = {str(number): value for number, value in layers.items()}
    return result


@contextmanager
def _measuring(model: GPTModel, rows: int, index_key_dtype: torch.dtype | None) -> Iterator[None]:
    """Sparse attention, no logits (they would take vocabulary x tokens), and fresh metrics in every MSA
    layer."""
    layers = list(msa_layers(model))
    before = (
        [layer.phase for layer in layers],
        model.post_process,
        model.training,
        model.config.msa_quality_rows,
    )
    for layer in layers:
        layer.phase = Phase.SPARSE
        if index_key_dtype is not None:
            layer.index_key_as_kept = partial(as_kept, dtype=index_key_dtype)
        layer.metrics.reset()
    model.post_process, model.config.msa_quality_rows = False, rows
    model.eval()
    try:
        yield
    finally:
        phases, model.post_process, training, model.config.msa_quality_rows = before
        for layer, phase in zip(layers, phases, strict=True):
            layer.phase, layer.sample_quality, layer.index_key_as_kept = phase, False, None
            layer.metrics.reset()
        model.train(training)
