"""What is measured: head counts, shapes, and the patterns in which queries select blocks.

Letters in shapes: Q queries, K keys, Hkv groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from msa_kernels import DocumentLayout
from torch import Tensor

WORKLOADS = Path(__file__).parent / "workloads"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention layer: 64 query heads over 4 groups in the standard configuration of arXiv 2606.13392."""

    query: int = 64
    groups: int = 4
    dim: int = 128
    index_dim: int = 128
    block_size: int = 128
    slots: int = 16
    """Blocks that a query and group selects, the local one included."""
    dtype: torch.dtype = torch.bfloat16


STANDARD = Heads()
TINY = Heads(query=8, groups=2, dim=8, index_dim=8, block_size=4, slots=4, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document's keys and the queries among them.

    Attributes:
        keys: number of keys, from the start of the document.
        fragments: (first position, length) of the stretches of queries, in order.
    """

    keys: int
    fragments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Documents whose keys, and whose queries, lie one behind the other.

    Attributes:
        name: unique among the shapes.
        documents: at least one.
        weight: how many real calls the shape stands for.
    """

    name: str
    documents: tuple[Document, ...]
    weight: int = 1

    @property
    def num_keys(self) -> int:
        """K."""
        return sum(document.keys for document in self.documents)

    @property
    def num_queries(self) -> int:
        """Q."""
        return sum(length for document in self.documents for _, length in document.fragments)

    @property
    def num_documents(self) -> int:
        """Documents among the keys."""
        return len(self.documents)

    @property
    def is_single_document(self) -> bool:
        """Every key is a query, and all are of one document: what dense kernels take as plain causal."""
        return len(self.documents) == 1 and self.documents[0].fragments == ((0, self.num_keys),)

    def layout(self, device: torch.device | str) -> DocumentLayout:
        """The shape as the operators take it."""
        lengths = torch.tensor([0, *(document.keys for document in self.documents)])
        number = [
            torch.full((length,), index)
            for index, document in enumerate(self.documents)
            for _, length in document.fragments
        ]
        return DocumentLayout(
            document_offsets=lengths.cumsum(0).to(device, torch.int32),
            query_document=torch.cat(number).to(device, torch.int32),
            query_position=self.positions().to(device, torch.int32),
            max_document_length=max(document.keys for document in self.documents),
        )

    def positions(self) -> Tensor:
        """Position of each query in its document, int64 [Q]."""
        return torch.cat(
            [
                torch.arange(first, first + length)
                for document in self.documents
                for first, length in document.fragments
            ]
        )

    def causal_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return int((self.positions() + 1).sum())

    def sparse_pairs(self, heads: Heads) -> int:
        """Pairs of a query and a key that it attends to, for one group; the same whatever is selected.

        All visible keys as long as there are no more blocks than slots, else the whole blocks of all slots
        but one, and the local block up to the query.
        """
        position = self.positions()
        within = position % heads.block_size + 1
        full = (heads.slots - 1) * heads.block_size + within
        return int(torch.where(position < heads.slots * heads.block_size, position + 1, full).sum())


def single_document(name: str, tokens: int) -> Shape:
    """One document, every token a query."""
    return Shape(name=name, documents=(Document(keys=tokens, fragments=((0, tokens),)),))


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """Sequences that each get one new token.

    Attributes:
        name: unique among the shapes.
        sequences: S.
        tokens: in the cache of each, the new one included.
        weight: as of ``Shape``.
    """

    name: str
    sequences: int
    tokens: int
    weight: int = 1

    @property
    def num_queries(self) -> int:
        """One per sequence."""
        return self.sequences

    @property
    def num_keys(self) -> int:
        """Of all sequences."""
        return self.sequences * self.tokens

    @property
    def num_documents(self) -> int:
        """Every sequence is a document."""
        return self.sequences

    def selected_tokens(self, heads: Heads) -> int:
        """Tokens that a new token attends to, for one group."""
        last = (self.tokens - 1) % heads.block_size + 1
        return min(self.tokens, (heads.slots - 1) * heads.block_size + last)


CONTEXTS = {f"{2**power // 1024}k": 2**power for power in range(12, 20)} | {"1m": 2**20}
TINY_DIVISOR = 4096


def contexts(tiny: bool = False) -> dict[str, Shape]:
    """Single documents of 4,096 to 1,048,576 tokens, "4k" to "1m"; if tiny, of TINY_DIVISOR times fewer."""
    divisor = TINY_DIVISOR if tiny else 1
    return {name: single_document(name, tokens // divisor) for name, tokens in CONTEXTS.items()}


def decode_shapes(tiny: bool = False) -> dict[str, DecodeShape]:
    """Batches of a new token per sequence by cache length and batch size, the bars' first."""
    divisor = TINY_DIVISOR if tiny else 1
    return {
        f"{context}-b{sequences}": DecodeShape(
            name=f"{context}-b{sequences}", sequences=sequences, tokens=CONTEXTS[context] // divisor
        )
        for context, sequences in (("1m", 4), ("128k", 16), ("128k", 1), ("1m", 1), ("32k", 64))
    }


def real_shapes(tiny: bool = False) -> list[Shape]:
    """One rank's queries and the keys they need, from workloads/ (its README names the source)."""
    data = json.loads((WORKLOADS / ("tiny.json" if tiny else "cp16_192k.json")).read_text())
    return [_shape_of_case(case) for case in data["cases"]]


def _shape_of_case(case: dict) -> Shape:
    queries, keys, first_of = case["cu_seqlens_q"], case["cu_seqlens_kv"], case["fragment_indices"]
    documents = []
    for first in sorted(set(first_of)):
        own = [index for index, each in enumerate(first_of) if each == first]
        # A fragment's queries are the last of the keys up to its own end.
        ends = [keys[index + 1] - keys[first] for index in own]
        lengths = [queries[index + 1] - queries[index] for index in own]
        fragments = tuple((end - length, length) for end, length in zip(ends, lengths, strict=True))
        documents.append(Document(keys=ends[-1], fragments=fragments))
    name = f"real-{case['benchmark_case_id']:02d}"
    return Shape(name=name, documents=tuple(documents), weight=case["representative_weight"])


def recent(layout: DocumentLayout, heads: Heads, generator: torch.Generator) -> Tensor:
    """The local block and those just before it: a sliding window."""
    slot = torch.arange(heads.slots, device=layout.device)
    local = _local_block(layout, heads)
    block_ids = (local - (heads.slots - 1)).clamp(min=0) + slot
    return block_ids.where(block_ids <= local, -1).expand(-1, heads.groups, -1).contiguous().int()


def local(layout: DocumentLayout, heads: Heads, generator: torch.Generator) -> Tensor:
    """Neighbouring queries share about 90 % of their blocks, as those of trained models do."""
    return _draw(layout, heads, generator, change=0.1)


def random(layout: DocumentLayout, heads: Heads, generator: torch.Generator) -> Tensor:
    """Every query and group draws its blocks anew."""
    return _draw(layout, heads, generator, change=1.0)


def hot(layout: DocumentLayout, heads: Heads, generator: torch.Generator) -> Tensor:
    """Random, but every query takes the first block of its document: one block with all queries."""
    block_ids = random(layout, heads, generator)
    block_ids[..., 0] = 0
    return block_ids


# The pattern "index" is not here: it is what block_select returns for the index inputs of the same call.
PATTERNS: dict[str, Callable[[DocumentLayout, Heads, torch.Generator], Tensor]] = {
    "local": local,
    "random": random,
    "recent": recent,
    "hot": hot,
}


def select(pattern: str, layout: DocumentLayout, heads: Heads, *, seed: int = 0) -> Tensor:
    """Block ids of a pattern, int32 [Q, Hkv, slots]: distinct, local block last, -1 behind it."""
    generator = torch.Generator(layout.device).manual_seed(seed)
    return PATTERNS[pattern](layout, heads, generator)


def _local_block(layout: DocumentLayout, heads: Heads) -> Tensor:
    return (layout.query_position // heads.block_size).long()[:, None, None]


def _draw(layout: DocumentLayout, heads: Heads, generator: torch.Generator, *, change: float) -> Tensor:
    """Each slot draws from a range of blocks of its own, so that a row's blocks differ.

    From one query to the next, a slot draws again with probability ``change``.
    """
    device = layout.device
    shape = (layout.num_queries, heads.groups, heads.slots - 1)
    query = torch.arange(layout.num_queries, device=device)
    again = torch.rand(shape, generator=generator, device=device) < change
    last_draw = torch.where(again, query[:, None, None], 0).cummax(0).values
    draw = torch.rand(shape, generator=generator, device=device).gather(0, last_draw)

    local = _local_block(layout, heads)
    others = heads.slots - 1
    slot = torch.arange(others, device=device)
    low, high = slot * local // others, (slot + 1) * local // others
    drawn = torch.minimum(low + (draw * (high - low)).long(), high - 1)
    drawn = torch.cat([drawn, local.expand(-1, heads.groups, 1)], dim=-1)
    all_of_them = torch.arange(heads.slots, device=device)
    all_of_them = all_of_them.where(all_of_them <= local, -1)
    return torch.where(local < heads.slots, all_of_them, drawn).int()
