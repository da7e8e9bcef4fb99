"""Checks of what tensors hold: always on the CPU, where they are free, and on a GPU when debugging.

On a GPU every such check waits for the device. It is left out there unless the environment variable
``MSA_DEBUG_CHECKS`` is set to 1, or inside ``debug_checks()``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout

ENVIRONMENT_VARIABLE = "MSA_DEBUG_CHECKS"

_debugging: ContextVar[bool | None] = ContextVar("msa_kernels_debugging", default=None)


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Turns the debug mode on (or off) for the calls inside, whatever the environment variable says.

    The ops then check on any device that their inputs are finite, that the documents cover the keys, that
    every query lies in its document, and that block ids are valid and distinct. Each check waits for the
    device, so this is no mode for training or for capturing CUDA graphs.
    """
    token = _debugging.set(enabled)
    try:
        yield
    finally:
        _debugging.reset(token)


def is_debugging() -> bool:
    """Whether the debug mode is on."""
    enabled = _debugging.get()
    return os.environ.get(ENVIRONMENT_VARIABLE, "0") == "1" if enabled is None else enabled


def check_finite(tensors: dict[str, Tensor]) -> None:
    """In debug mode, raises ValueError if a tensor holds NaN or an infinity."""
    if not is_debugging():
        return
    for name, tensor in tensors.items():
        place = first_place(~tensor.isfinite())
        if place is not None:
            raise ValueError(
                f"{name}{place} is {float(tensor[tuple(place)])}; all inputs must be finite (debug mode)"
            )


def check_layout_values(layout: DocumentLayout, num_keys: int) -> None:
    """Raises ValueError unless documents cover the keys and every query lies in its document."""
    if not may_read(layout.device):
        return
    offsets = layout.document_offsets
    lengths = offsets.diff()
    if offsets[0] != 0 or (lengths < 0).any():
        raise ValueError(f"document_offsets must start with 0 and never fall, got {offsets.tolist()}")
    if offsets[-1] != num_keys:
        raise ValueError(f"layout describes {int(offsets[-1])} keys but there are {num_keys}")
    if (lengths > layout.max_document_length).any():
        raise ValueError(
            f"max_document_length is {layout.max_document_length} but a document has {int(lengths.max())} "
            "tokens; it must be an upper bound"
        )
    document, position = layout.query_document, layout.query_position
    if ((document < 0) | (document >= layout.num_documents)).any():
        raise ValueError(
            f"query_document must be 0 .. {layout.num_documents - 1}, "
            f"got {int(document.min())} .. {int(document.max())}"
        )
    place = first_place((position < 0) | (position >= lengths[document]))
    if place is not None:
        query = place[0]
        raise ValueError(
            f"query {query} has position {int(position[query])} in document {int(document[query])}, "
            f"which has {int(lengths[document[query]])} tokens; positions count from 0 within the document"
        )


def check_block_id_values(block_ids: Tensor, layout: DocumentLayout, block_size: int) -> None:
    """Raises ValueError unless every row names distinct blocks that its query sees, -1 only behind them.

    Args:
        block_ids: int32 [Q, groups, slots].
        layout: of the Q queries.
        block_size: tokens per block.
    """
    if not may_read(block_ids.device):
        return
    local = (layout.query_position // block_size)[:, None, None]
    place = first_place((block_ids < -1) | (block_ids > local))
    if place is not None:
        query, group, _ = place
        raise ValueError(
            f"block_ids{place} is {int(block_ids[tuple(place)])}: query {query}, at position "
            f"{int(layout.query_position[query])} of its document, sees blocks 0 .. {int(local[query])} of "
            f"{block_size} tokens (group {group}); -1 is padding"
        )
    place = first_place((block_ids[..., 1:] >= 0) & (block_ids[..., :-1] < 0))
    if place is not None:
        query, group, slot = place
        raise ValueError(
            f"block_ids[{query}, {group}, {slot + 1}] is {int(block_ids[query, group, slot + 1])} behind the "
            f"padding -1 (query {query}, group {group}); put the valid entries first"
        )
    ordered = block_ids.sort(dim=-1).values
    place = first_place((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0))
    if place is not None:
        query, group, slot = place
        raise ValueError(
            f"block_ids names block {int(ordered[query, group, slot])} more than once for query {query}, "
            f"group {group}: {block_ids[query, group].tolist()}; entries of a row must differ"
        )


def may_read(device: torch.device) -> bool:
    """Whether values on this device are checked."""
    return device.type == "cpu" or (is_debugging() and device.type != "meta")


def first_place(wrong: Tensor) -> list[int] | None:
    """The first place that is true, None if there is none."""
    places = wrong.nonzero()
    return places[0].tolist() if len(places) else None
