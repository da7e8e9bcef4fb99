"""Which tokens of a microbatch each context-parallel rank holds.

All tokens of a microbatch, laid end to end, are in *global order*: sequence after sequence (batch-major), or
the pack of documents as it is. A layout cuts them into chunks and deals these to the ranks; every rank gets
the same number of tokens and keeps its chunks in global order.

- zigzag: each sample is cut into 2 C chunks, rank r gets chunks r and 2C-1-r (Megatron's layout for plain
  batches). Exact balance for one causal sequence, none for documents of different lengths.
- balanced: small chunks, dealt by the number of (query, key) pairs that their tokens see within their
  documents.
- documents: each document is cut by itself into 2 C chunks (Megatron's layout for packed sequences, which
  Transformer Engine's attention and multi-token prediction expect). Every document's length, padding
  included, must be a multiple of 2 C.

Boundaries of documents may lie anywhere: inside chunks, blocks of keys and ranks.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_msa.errors import ConfigError

CHUNK_LENGTH = 1024
"""Tokens of a chunk of the balanced layout, or the largest divisor of this that the sequence allows."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of one rank; a list of chunks covers the microbatch in global order."""

    length: int
    rank: int


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens of every rank, T in all, C ranks.

    Attributes:
        rank: this rank's place in its context-parallel group.
        owned: int64 [C, T / C], the tokens of each rank as places in global order, ascending.
        place: int64 [T], where each token of the global order lies when the tokens of all ranks are laid one
            rank behind the other.
    """

    rank: int
    owned: Tensor
    place: Tensor

    @classmethod
    def build(cls, chunks: Sequence[Chunk], *, size: int, rank: int, device: torch.device) -> TokenLayout:
        """From chunks in global order, which must give every rank equally many tokens."""
        lengths = torch.tensor([chunk.length for chunk in chunks])
        owner = torch.tensor([chunk.rank for chunk in chunks]).repeat_interleave(lengths).to(device)
        owned = owner.argsort(stable=True)
        place = torch.empty_like(owned)
        place[owned] = torch.arange(owned.numel(), device=device)
        return cls(rank=rank, owned=owned.view(size, -1), place=place)

    @property
    def size(self) -> int:
        """C, the number of ranks."""
        return self.owned.shape[0]

    @property
    def local(self) -> Tensor:
        """int64 [T / C], the tokens of this rank."""
        return self.owned[self.rank]


def layout_kind(setting: str, *, packed: bool) -> str:
    """What ``--msa-cp-layout`` means for plain batches and for packed documents."""
    if setting == "auto":
        return "balanced" if packed else "zigzag"
    return "zigzag" if setting == "documents" and not packed else setting


def packed_layout(
    setting: str, offsets: Sequence[int], *, samples: int, size: int, rank: int, device: torch.device
) -> TokenLayout:
    """The layout of packed documents.

    Args:
        setting: ``--msa-cp-layout``.
        offsets: start of each document and, last, the number of tokens, on the host.
        samples: equally long samples that the pack consists of; the zigzag layout cuts each of them.
        size: ranks of the context-parallel group.
        rank: this rank's place in it.
        device: where the layout's tensors live.

    Raises:
        ConfigError: the tokens do not divide as the layout needs.
    """
    kind = layout_kind(setting, packed=True)
    total = offsets[-1]
    if kind == "documents":
        chunks = _each_document(offsets, size)
    else:
        check_length(total // samples, size)
        chunks = (
            _balanced(offsets, size) if kind == "balanced" else _zigzag([total // samples] * samples, size)
        )
    return TokenLayout.build(chunks, size=size, rank=rank, device=device)


@lru_cache(maxsize=8)
def batch_layout(
    setting: str, *, batch: int, length: int, size: int, rank: int, device: torch.device
) -> TokenLayout:
    """The layout of a plain batch of ``batch`` sequences of ``length`` tokens, each cut alike.

    Raises:
        ConfigError: the sequence does not divide as the layout needs.
    """
    check_length(length, size)
    balanced = layout_kind(setting, packed=False) == "balanced"
    chunks = _balanced((0, length), size) if balanced else _zigzag([length], size)
    with torch.inference_mode(False):  # kept for training too, which cannot save tensors of inference mode
        return TokenLayout.build(chunks * batch, size=size, rank=rank, device=device)


def check_length(length: int, size: int) -> None:
    """Refuse a sequence that cannot be cut into 2 C equal chunks.

    Raises:
        ConfigError: names the lengths that would do.
    """
    if length % (2 * size):
        below = length - length % (2 * size)
        nearest = " or ".join(str(each) for each in (below, below + 2 * size) if each)
        raise ConfigError(
            f"a sequence of {length} tokens cannot be cut for --context-parallel-size {size}: its length "
            f"must be a multiple of {2 * size} (twice the ranks). Use --seq-length {nearest}, or fewer ranks."
        )


def causal_pairs_before(offsets: Sequence[int], tokens: Iterable[int]) -> list[int]:
    """(query, key) pairs of causal attention within documents, over the queries before each of ``tokens``."""
    whole = [0, *accumulate(_pairs(end - start) for start, end in pairwise(offsets))]
    documents = [(token, bisect_right(offsets, token) - 1) for token in tokens]
    return [whole[document] + _pairs(token - offsets[document]) for token, document in documents]


def _pairs(length: int) -> int:
    return length * (length + 1) // 2


def _zigzag(lengths: Sequence[int], size: int) -> list[Chunk]:
    """Each of the stretches of these lengths in 2 C chunks, dealt there and back again."""
    order = [*range(size), *reversed(range(size))]
    return [Chunk(length // (2 * size), rank) for length in lengths for rank in order]


def _each_document(offsets: Sequence[int], size: int) -> list[Chunk]:
    lengths = [end - start for start, end in pairwise(offsets)]
    for number, length in enumerate(lengths):
        if length % (2 * size):
            raise ConfigError(
                f"document {number} of a pack has {length} tokens, padding included; --msa-cp-layout "
                f"documents with --context-parallel-size {size} cuts each document into {2 * size} equal "
                f"chunks. Pad the documents to multiples of {2 * size}, or use --msa-cp-layout balanced."
            )
    return _zigzag(lengths, size)


def _balanced(offsets: Sequence[int], size: int) -> list[Chunk]:
    """Chunks in order of falling work, each for the rank with the least work so far that is not full yet.

    The work is the number of causal pairs: the index scores take all of them, and sparse attention, which is
    nearly linear, comes out even because every rank gets the same number of tokens.
    """
    total = offsets[-1]
    length = math.gcd(total // (2 * size), CHUNK_LENGTH)
    before = causal_pairs_before(offsets, range(0, total + 1, length))
    work = [after - start for start, after in pairwise(before)]
    room = [len(work) // size] * size
    least = [(0, rank) for rank in range(size)]
    owner = [0] * len(work)
    for chunk in sorted(range(len(work)), key=lambda chunk: -work[chunk]):
        load, rank = heapq.heappop(least)
        owner[chunk] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(least, (load + work[chunk], rank))
    return [Chunk(length, rank) for rank in owner]
