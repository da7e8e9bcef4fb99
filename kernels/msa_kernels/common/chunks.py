"""Running a reference over chunks of queries, so that no buffer grows with queries times keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Budget of the largest buffer of a chunk, the scores. A chunk holds a few buffers of that size at its peak.
MAX_CHUNK_BYTES = 256 * 2**20

type Rows = tuple[Tensor | None, ...]


def in_query_chunks(
    compute: Callable[[slice], Rows],
    *,
    num_queries: int,
    bytes_per_query: int,
    device: torch.device,
    recompute_for_backward: bool = False,
) -> Rows:
    """Calls ``compute`` on slices that cover all queries in order, and concatenates what it returns.

    Args:
        compute: maps a slice of the queries to tensors whose first dimension is that slice (or to None).
        num_queries: number of queries, may be 0.
        bytes_per_query: size of the largest buffer that ``compute`` makes for one query.
        device: device of the inputs.
        recompute_for_backward: with more than one chunk, keep nothing but inputs for the backward pass and
            compute each chunk again there. Otherwise the graph holds the scores of all chunks at once.
    """
    chunk_size = max(1, MAX_CHUNK_BYTES // max(1, bytes_per_query))
    # A call with no queries still runs one (empty) chunk: its outputs then have the right shapes and dtypes.
    chunks = [slice(start, start + chunk_size) for start in range(0, max(1, num_queries), chunk_size)]
    parts = []
    # The references choose their dtypes themselves; autocast would turn their matmuls back to 16 bit.
    with torch.autocast(device_type=device.type, enabled=False):
        for rows in chunks:
            if recompute_for_backward and len(chunks) > 1:
                parts.append(checkpoint(compute, rows, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(compute(rows))
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
