"""A correction to megatron-core 0.19.2: what a step changes besides parameters, when the step is run again.

A NaN or a spike makes Megatron's rerun machine repeat the forward and backward pass: the same result means
the data or the model, another one a fault of the GPU. For that it restores random states and rewinds the
data, and nothing else. But the pass also moves the routers' expert biases (buffers, updated while gradients
are finalised), so that the repetition would send tokens to other experts and accuse the hardware; and we
count documents and patches, which would be counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training


class Counter(Protocol):
    """What is counted while batches are read."""

    def saved(self) -> Any: ...
    def restore(self, saved: Any) -> None: ...


def keep_in_reruns(model: Sequence[torch.nn.Module], counters: Sequence[Counter]) -> None:
    """Let the rerun machine save and restore the model's buffers and the counts. Call once per machine."""
    machine = get_rerun_state_machine()
    save, restore = machine.state_save_func, machine.state_restore_func
    machine.state_save_func = lambda: _save(save, model, counters)
    machine.state_restore_func = lambda state: _restore(state, restore, model, counters)


def _save(
    megatrons: Callable[[], Any] | None, model: Sequence[torch.nn.Module], counters: Sequence[Counter]
) -> dict[str, Any]:
    return {
        "megatron": megatrons() if megatrons else None,
        "buffers": [buffer.clone() for buffer in _buffers(model)],
        "counts": [counter.saved() for counter in counters],
    }


def _restore(
    state: dict[str, Any],
    megatrons: Callable[[Any], None] | None,
    model: Sequence[torch.nn.Module],
    counters: Sequence[Counter],
) -> None:
    if megatrons:
        megatrons(state["megatron"])
    with torch.no_grad():
        for buffer, saved in zip(_buffers(model), state["buffers"], strict=True):
            buffer.copy_(saved)
    for counter, saved in zip(counters, state["counts"], strict=True):
        counter.restore(saved)
    # Megatron's own count of the documents of this step, which is empty where a step starts.
    if training._seqlen_stats_in_iteration is not None:
        training._seqlen_stats_in_iteration.zero_()


def _buffers(model: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    # Not `buffers()`: in Megatron's wrapper that is the list of its gradient buffers.
    return [buffer for chunk in model for _, buffer in chunk.named_buffers()]
