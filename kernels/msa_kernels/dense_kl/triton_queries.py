"""The queries in the order of their keys: what the kernels of dense_kl iterate over.

Documents lie one behind the other among the keys, so a query sees an interval of packed keys: from the start
of its document to its own place. Sorted by the end of that interval (and so by its start), the queries that a
tile of keys serves are neighbours, whatever order and subset the caller gave. Everything here is computed on
the device from tensors of host-known sizes.

Letters in shapes: Q queries, K keys. A *place* is a query's number in sorted order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.common.layout import DocumentLayout

LOG2E = math.log2(math.e)


@triton.jit
def load_intervals(first_keys, last_keys, place, num_queries):
    """First and last visible key of each place; places behind the end repeat the last one."""
    safe_place = tl.minimum(place, num_queries - 1)
    return tl.load(first_keys + safe_place), tl.load(last_keys + safe_place)


@triton.jit
def sees(key, first_key, last_key):
    """Whether each place sees each key: bool [places, keys]."""
    return (key[None, :] >= first_key[:, None]) & (key[None, :] <= last_key[:, None])


@triton.jit
def some_see(begin, end, first_key, last_key):
    """Whether any place sees any key of begin .. end, given that those of one document would."""
    is_seen = tl.min(first_key, 0) == tl.max(first_key, 0)
    if not is_seen:
        is_seen = tl.max(((first_key < end) & (last_key >= begin)).to(tl.int32), 0) > 0
    return is_seen


@dataclass(frozen=True, kw_only=True, eq=False)
class SortedQueries:
    """The queries of a layout, sorted by the last key they see.

    Attributes:
        first_key: int32 [Q] by place, packed number of the first key that the query sees. Never falls.
        last_key: int32 [Q] by place, packed number of the last one, the query's own. Never falls.
        order: int64 [Q], the query at each place; None if that is the place itself.
        places: int64 [Q], the place of each query; None if that is the query itself.
    """

    first_key: Tensor
    last_key: Tensor
    order: Tensor | None
    places: Tensor | None

    @classmethod
    def build(cls, layout: DocumentLayout) -> SortedQueries:
        """Sorts the queries, unless the layout knows that they are the keys in order."""
        first_key = layout.document_offsets[layout.query_document]
        last_key = first_key + layout.query_position
        if layout.queries_are_keys:
            return cls(first_key=first_key, last_key=last_key, order=None, places=None)
        last_key, order = last_key.sort(stable=True)
        return cls(first_key=first_key[order], last_key=last_key, order=order, places=order.argsort())

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.last_key.numel()

    def by_place(self, tensor: Tensor) -> Tensor:
        """[Q, ...] by query -> by place, in one aligned piece."""
        return aligned(tensor if self.order is None else tensor[self.order])

    def by_query(self, tensor: Tensor) -> Tensor:
        """[Q, ...] by place -> by query."""
        return tensor if self.places is None else tensor[self.places]


def aligned(tensor: Tensor) -> Tensor:
    """The same values in one piece that starts at a multiple of 16 bytes, as tensor descriptors need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def rows_of_heads(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Reads [N, heads, d] (or [N, d]) as [N, heads * d] in tiles of ``rows`` rows of one head.

    Rows behind the last one are read as zeros, and not written.
    """
    return TensorDescriptor.from_tensor(tensor.flatten(1), [rows, tensor.shape[-1]])
