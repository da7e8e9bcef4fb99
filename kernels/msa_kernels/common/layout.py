"""Which keys each query may see.

Letters in shapes: Q queries, K keys, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentLayout:
    """Which keys each query may see: packed documents and the position of every query in its document.

    All keys of all documents lie one behind the other; document D owns the keys
    ``document_offsets[D] : document_offsets[D + 1]`` and may be empty. Queries are any subset of the keys'
    places, in any order (under context parallelism a rank holds all keys and some of the queries). A query at
    position p of its document sees the keys at positions 0 .. p of the same document, and no others.

    Attributes:
        document_offsets: int32 [D + 1], start of each document among the keys; the last entry is K.
        query_document: int32 [Q], the document of each query.
        query_position: int32 [Q], 0-based position of each query within its document, in tokens.
        max_document_length: upper bound, in tokens, of the length of any document. Lives on the host, so that
            shapes can be derived from it without waiting for the device.
        queries_are_keys: query i is key i, for all of them. A hint from who built the layout: it permits
            faster kernels, and False is always right.

    Raises:
        TypeError: a tensor is not int32, or max_document_length is not an int.
        ValueError: a tensor has the wrong shape or device.
    """

    document_offsets: Tensor
    query_document: Tensor
    query_position: Tensor
    max_document_length: int
    queries_are_keys: bool = False

    def __post_init__(self) -> None:
        for name in ("document_offsets", "query_document", "query_position"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be an int32 tensor, got {got}; use .to(torch.int32)")
            if tensor.dim() != 1:
                raise ValueError(f"{name} must have one dimension, got shape {list(tensor.shape)}")
            if tensor.device != self.document_offsets.device:
                raise ValueError(
                    f"{name} is on {tensor.device} but document_offsets is on "
                    f"{self.document_offsets.device}; move all tensors of a layout to one device"
                )
        if self.document_offsets.numel() == 0:
            raise ValueError(
                "document_offsets is empty; it needs the start of each document and, last, the key count"
            )
        if self.query_document.shape != self.query_position.shape:
            raise ValueError(
                f"query_document has {self.query_document.numel()} entries but query_position has "
                f"{self.query_position.numel()}; give one of each per query"
            )
        if not isinstance(self.max_document_length, int):
            got = type(self.max_document_length).__name__
            raise TypeError(f"max_document_length must be an int on the host, got {got}")
        if self.max_document_length < 0:
            raise ValueError(f"max_document_length must be 0 or more tokens, got {self.max_document_length}")

    @classmethod
    def dense_batch(
        cls, batch_size: int, seq_length: int, *, device: torch.device | str | None = None
    ) -> DocumentLayout:
        """Layout of a plain batch: one document per sequence, packed batch-major, every key is also a query.

        Args:
            batch_size: number of sequences, 1 or more.
            seq_length: tokens of every sequence, 1 or more.
            device: where the layout's tensors live.
        """
        if batch_size < 1 or seq_length < 1:
            raise ValueError(
                f"batch_size and seq_length must be 1 or more, got {batch_size} and {seq_length}"
            )
        document = torch.arange(batch_size, dtype=torch.int32, device=device)
        position = torch.arange(seq_length, dtype=torch.int32, device=device)
        offsets = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_length
        return cls(
            document_offsets=offsets,
            query_document=document.repeat_interleave(seq_length),
            query_position=position.repeat(batch_size),
            max_document_length=seq_length,
            queries_are_keys=True,
        )

    @classmethod
    def from_document_offsets(
        cls,
        document_offsets: Tensor,
        *,
        max_document_length: int | None = None,
        num_keys: int | None = None,
    ) -> DocumentLayout:
        """Layout of packed documents in which every key is also a query.

        Args:
            document_offsets: integer [D + 1], starting with 0 and never falling; two equal neighbours are an
                empty document.
            max_document_length: upper bound of a document's length in tokens; read from the offsets if None.
            num_keys: K, the last offset; read from the offsets if None. With both given, a layout on a GPU is
                built without waiting for the device.
        """
        offsets = document_offsets.to(torch.int32)
        if num_keys is None:
            num_keys = int(offsets[-1])
        if max_document_length is None:
            max_document_length = int(offsets.diff().max()) if offsets.numel() > 1 else 0
        document = _document_of_key(offsets, num_keys)
        return cls(
            document_offsets=offsets,
            query_document=document,
            query_position=_position_of_key(offsets, document),
            max_document_length=max_document_length,
            queries_are_keys=True,
        )

    def select_queries(self, query_index: Tensor | slice) -> DocumentLayout:
        """The same documents with only the chosen queries, in the order chosen.

        Args:
            query_index: integer [Q'] or bool [Q] tensor, or a slice.
        """
        return DocumentLayout(
            document_offsets=self.document_offsets,
            query_document=self.query_document[query_index],
            query_position=self.query_position[query_index],
            max_document_length=self.max_document_length,
        )

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.query_document.numel()

    @property
    def num_documents(self) -> int:
        """D, empty documents included."""
        return self.document_offsets.numel() - 1

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors live."""
        return self.document_offsets.device

    def max_blocks(self, block_size: int) -> int:
        """Upper bound of the number of blocks of a document; block ids are below it."""
        return -(-self.max_document_length // block_size)

    def key_document(self, num_keys: int) -> Tensor:
        """The document of each key, int32 [K]. K comes from the caller, who knows it on the host."""
        return _document_of_key(self.document_offsets, num_keys)

    def key_position(self, num_keys: int) -> Tensor:
        """The position of each key within its document, int32 [K]."""
        return _position_of_key(self.document_offsets, self.key_document(num_keys))

    def visible_keys(self, num_keys: int) -> Tensor:
        """Whether a query sees a key: bool [Q, K], true for keys of its document up to its own position.

        Grows with Q times K: take a chunk of the queries first (``select_queries``).
        """
        key_document = self.key_document(num_keys)
        key_position = _position_of_key(self.document_offsets, key_document)
        same_document = self.query_document[:, None] == key_document
        return same_document & (key_position <= self.query_position[:, None])


def _document_of_key(offsets: Tensor, num_keys: int) -> Tensor:
    # A key belongs to the document whose end is the first one behind it; equal ends are empty documents,
    # which right=True steps over.
    key = torch.arange(num_keys, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets[1:], key, right=True, out_int32=True)


def _position_of_key(offsets: Tensor, key_document: Tensor) -> Tensor:
    key = torch.arange(key_document.numel(), dtype=torch.int32, device=offsets.device)
    return key - offsets[key_document]
