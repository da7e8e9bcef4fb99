"""From hidden states to logits or log-probabilities of some rows only: Megatron's `output_processor` hook.

Logits of a whole chunk would take tokens x vocabulary numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_msa.inference.prefill import PrefillChunk

_LOGITS_AT_A_TIME = 2**26
"""Numbers of the slice of logits that is in memory at once."""


def logits_of(chunk: PrefillChunk, rows: Tensor) -> Callable[..., Tensor | None]:
    """A hook that gives the logits of these rows.

    Args:
        chunk: the forward pass.
        rows: int64 [n], places in the chunk. None of them: the hook gives None.

    Returns:
        A hook that returns [n, vocabulary], on every rank.
    """

    def process(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        **_: Any,
    ) -> Tensor | None:
        if not rows.numel():
            return None
        with _whole_rows(output_layer, hidden_states) as hidden:
            wanted, places = _own_rows(chunk, rows)
            chosen = hidden.new_zeros(rows.numel(), hidden.shape[-1])
            chosen[places] = hidden[wanted]
            _sum_over_context_ranks(chunk, chosen)
            logits, _ = output_layer(chosen.unsqueeze(1), weight=output_weight, runtime_gather_output=True)
        return scale_logits(logits).squeeze(1)

    return process


def log_probabilities_of(chunk: PrefillChunk, rows: Tensor, labels: Tensor) -> Callable[..., Tensor]:
    """A hook that gives log P(label) after each of these rows.

    Args:
        chunk: the forward pass.
        rows: int64 [n], places in the chunk.
        labels: int64 [n], the token that follows each of them.

    Returns:
        A hook that returns fp32 [n], on every rank.
    """

    def process(
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        found = torch.zeros(rows.numel(), dtype=torch.float32, device=hidden_states.device)
        with _whole_rows(output_layer, hidden_states) as hidden:
            wanted, places = _own_rows(chunk, rows)
            at_a_time = max(1, _LOGITS_AT_A_TIME // output_layer.output_size_per_partition)
            for some, there in zip(wanted.split(at_a_time), places.split(at_a_time), strict=True):
                logits, _ = output_layer(
                    hidden[some].unsqueeze(1), weight=output_weight, runtime_gather_output=False
                )
                loss = vocab_parallel_cross_entropy(
                    scale_logits(logits).float(), labels[there][:, None], tp_group=output_layer.tp_group
                )
                found[there] = -loss[:, 0]
        _sum_over_context_ranks(chunk, found)
        return found

    return process


@contextmanager
def _whole_rows(output_layer: Any, hidden_states: Tensor) -> Iterator[Tensor]:
    """Hidden states [t, hidden] of all of this context-parallel rank's rows, and an output layer for such."""
    sequence_parallel = output_layer.sequence_parallel
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
    output_layer.sequence_parallel = False
    try:
        yield hidden_states.squeeze(1)
    finally:
        output_layer.sequence_parallel = sequence_parallel


def _own_rows(chunk: PrefillChunk, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the wanted rows, those of this rank as places in its hidden states, and as places in ``rows``."""
    size = chunk.settings.cp_size
    places = (rows % size == chunk.settings.cp_rank).nonzero()[:, 0]
    return rows[places] // size, places


def _sum_over_context_ranks(chunk: PrefillChunk, values: Tensor) -> None:
    if chunk.settings.cp_size > 1:
        torch.distributed.all_reduce(values, group=chunk.settings.cp_group)
