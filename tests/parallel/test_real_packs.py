"""Real packs of 196,608 tokens on 16 ranks: the ranks' results together are the single rank's.

Small heads, plain PyTorch, one process that plays the ranks one after the other. One row of every chunk is
looked at. The published rank is also checked against its own description: fragments of documents, each with
the prefix of keys it needs.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from msa_kernels import DocumentLayout, block_select, sparse_attention
from torch import Tensor

from megatron_msa.attention.context_parallel import packed_layout

FILE = json.loads((Path(__file__).parents[2] / "kernels/benchmarks/workloads/cp16_192k.json").read_text())
RANKS, CHUNK, TOKENS = FILE["cp_size"], FILE["chunk_size"], FILE["total_tokens"]
BLOCK, SLOTS = FILE["msa"]["block_size"], FILE["msa"]["topk"]
HEADS, GROUPS, DIM = 2, 1, 8
FAST = (516,)
"""164 documents."""
CASES = [
    pytest.param(
        case,
        id=f"case {case['case_id']}, rank {case['rank']}",
        marks=[] if case["case_id"] in FAST else [pytest.mark.slow],
    )
    for case in FILE["cases"]
]


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor

    @classmethod
    def random(cls) -> "Tensors":
        generator = torch.Generator().manual_seed(5)
        heads = (HEADS, GROUPS, GROUPS, GROUPS, 1)
        return cls(*(torch.randn(TOKENS, number, DIM, generator=generator) for number in heads))

    def queries(self, rows: Tensor) -> "Tensors":
        """The queries of these rows, all keys."""
        return self._replace(q=self.q[rows], index_q=self.index_q[rows])

    def keys(self, rows: slice | Tensor) -> "Tensors":
        """The keys of these rows, all queries."""
        return self._replace(k=self.k[rows], v=self.v[rows], index_k=self.index_k[rows])


class Result(NamedTuple):
    block_ids: Tensor
    out: Tensor
    kl: Tensor


def compute(x: Tensors, layout: DocumentLayout) -> Result:
    selection = block_select(
        x.index_q, x.index_k, layout, block_size=BLOCK, num_selected_blocks=SLOTS, backend="reference"
    )
    index = {"index_q": x.index_q, "index_k": x.index_k}
    result = sparse_attention(
        x.q, x.k, x.v, selection.block_ids, layout, block_size=BLOCK, backend="reference", **index
    )
    assert result.kl is not None
    return Result(selection.block_ids, result.out, result.kl)


def assert_same(actual: Result, expected: Result) -> None:
    assert torch.equal(actual.block_ids, expected.block_ids)
    # The same sums over other shapes: rounding of fp32 over at most 2,048 tokens.
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.kl, expected.kl, rtol=1e-5, atol=1e-5)


def in_every_chunk(rank: int) -> Tensor:
    """Places of the looked-at rows among a rank's tokens: one in each chunk, elsewhere on each rank."""
    chunks = torch.arange(TOKENS // RANKS // CHUNK)
    return chunks * CHUNK + (chunks * 397 + rank * 61 + 1023) % CHUNK


@pytest.fixture(scope="module")
def everything() -> Tensors:
    return Tensors.random()


@pytest.mark.parametrize("case", CASES)
def test_the_union_of_the_ranks_is_the_single_rank(case: dict[str, Any], everything: Tensors) -> None:
    offsets = case["global_cu_seqlens"]
    whole = DocumentLayout.from_document_offsets(torch.tensor(offsets))
    results, rows = [], []
    for rank in range(RANKS):
        layout = packed_layout(
            "balanced", offsets, samples=1, size=RANKS, rank=rank, device=torch.device("cpu")
        )
        mine = layout.local[in_every_chunk(rank)]
        # As the exchange delivers them: rank after rank, then put into global order.
        keys = everything.keys(layout.owned.flatten()).keys(layout.place)
        results.append(compute(keys.queries(mine), whole.select_queries(mine)))
        rows.append(mine)
    looked_at = torch.cat(rows)
    assert len(set((looked_at // CHUNK).tolist())) == TOKENS // CHUNK, "a row of every chunk of the pack"
    union = Result(*(torch.cat(parts) for parts in zip(*results, strict=True)))
    order = torch.randperm(looked_at.numel(), generator=torch.Generator().manual_seed(1))
    expected = compute(everything.queries(looked_at[order]), whole.select_queries(looked_at[order]))
    assert_same(Result(*(part[order] for part in union)), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_published_rank_by_its_fragments(case: dict[str, Any], everything: Tensors) -> None:
    """Each fragment by itself, with the keys of its document's prefix only, against all keys at once."""
    chunks = torch.tensor(case["chunk_ids"])
    owned = (chunks[:, None] * CHUNK + torch.arange(CHUNK)).flatten()
    whole = DocumentLayout.from_document_offsets(torch.tensor(case["global_cu_seqlens"]))
    starts, ends = case["cu_seqlens_q"][:-1], case["cu_seqlens_q"][1:]
    kv = case["cu_seqlens_kv"]
    pairs = 0
    results, rows = [], []
    for fragment, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = kv[fragment + 1] - kv[case["fragment_indices"][fragment]]
        pairs += sum(range(length - (end - start) + 1, length + 1))
        at = torch.tensor(sorted({0, (end - start) // 2, end - start - 1}))
        row = owned[start + at]
        first_key = int(owned[end - 1]) + 1 - length
        alone = DocumentLayout(
            document_offsets=torch.tensor([0, length], dtype=torch.int32),
            query_document=torch.zeros(at.numel(), dtype=torch.int32),
            query_position=(length - (end - start) + at).int(),
            max_document_length=length,
        )
        keys = everything.keys(slice(first_key, first_key + length))
        results.append(compute(keys.queries(row), alone))
        rows.append(row)
    assert pairs == case["causal_elements"]
    looked_at = torch.cat(rows)
    assert set((looked_at // CHUNK).tolist()) == set(case["chunk_ids"])
    expected = compute(everything.queries(looked_at), whole.select_queries(looked_at))
    assert_same(Result(*(torch.cat(parts) for parts in zip(*results, strict=True))), expected)
