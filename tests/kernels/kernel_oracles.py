"""Inputs for the kernel tests, and the ops once more, as loops over single queries, heads and tokens.

Nothing here uses msa_kernels' arithmetic. Sizes in the tests are small because these loops are slow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from msa_kernels import DocumentLayout
from torch import Tensor

# Documents of one token, empty ones at every place, odd lengths, one longer than several blocks.
LENGTHS = [[1], [7, 1, 0, 16, 5], [0, 3, 0], [45], [0, 0, 33, 2, 0, 1]]


def packed_layout(lengths: list[int]) -> DocumentLayout:
    return DocumentLayout.from_document_offsets(torch.tensor([0, *lengths]).cumsum(0))


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor

    def clones(self, requires_grad: bool = True) -> Inputs:
        return Inputs(*(tensor.detach().clone().requires_grad_(requires_grad) for tensor in self))


def random_inputs(
    num_keys: int,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 6,
    value_dim: int = 5,
    index_dim: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(
        normal(num_keys, heads, dim),
        normal(num_keys, groups, dim),
        normal(num_keys, groups, value_dim),
        normal(num_keys, groups, index_dim),
        normal(num_keys, index_dim),
    )


def dot(left: Tensor, right: Tensor) -> float:
    return sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))


def logsumexp(values: list[float]) -> float:
    if any(math.isnan(value) for value in values):
        return math.nan
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def softmax(values: list[float]) -> list[float]:
    total = logsumexp(values)
    return [math.exp(value - total) for value in values]


def visible_tokens(
    layout: DocumentLayout, query: int, blocks: list[int] | None, block_size: int = 1
) -> list[int]:
    """Packed key numbers that a query sees, only those of ``blocks`` if given."""
    start = int(layout.document_offsets[int(layout.query_document[query])])
    positions = range(int(layout.query_position[query]) + 1)
    return [start + p for p in positions if blocks is None or p // block_size in blocks]


def brute_force_blocks(
    index_q: Tensor,
    index_k: Tensor,
    layout: DocumentLayout,
    query: int,
    group: int,
    block_size: int,
    count: int,
) -> list[int]:
    """The chosen block ids of one query and group, sorted; the local block is the largest of them."""
    local = int(layout.query_position[query]) // block_size
    scores: dict[int, float] = {}
    for block in range(local):
        tokens = visible_tokens(layout, query, [block], block_size)
        values = [dot(index_q[query, group], index_k[token]) for token in tokens]
        scores[block] = max(-math.inf if math.isnan(value) else value for value in values)
    best = sorted(scores, key=lambda block: (-scores[block], block))[: count - 1]
    return [*sorted(best), local]


def assert_selection_is_brute_force(
    block_ids: Tensor, index_q: Tensor, index_k: Tensor, layout: DocumentLayout, block_size: int
) -> None:
    """Same set of blocks, the local one last among the valid, -1 behind: for every query and group."""
    assert block_ids.dtype == torch.int32
    count = block_ids.shape[2]
    for query in range(layout.num_queries):
        for group in range(index_q.shape[1]):
            expected = brute_force_blocks(index_q, index_k, layout, query, group, block_size, count)
            found = block_ids[query, group].tolist()
            valid, padding = found[: len(expected)], found[len(expected) :]
            assert sorted(valid) == expected, (query, group, found)
            assert valid[-1] == expected[-1], (query, group, found)
            assert all(entry == -1 for entry in padding), (query, group, found)


class BruteForceAttention(NamedTuple):
    out: Tensor
    lse: Tensor
    kl_group_mean: Tensor
    kl_per_head: Tensor
    index_lse: Tensor


def brute_force_attention(
    inputs: Inputs, layout: DocumentLayout, block_ids: Tensor | None, block_size: int = 1
) -> BruteForceAttention:
    """Attention and both divergences over the tokens of ``block_ids``, or over all visible tokens if None."""
    q, k, v, index_q, index_k = inputs
    queries, heads, dim = q.shape
    groups = k.shape[1]
    out = torch.zeros(queries, heads, v.shape[2], dtype=torch.float64)
    lse = torch.zeros(queries, heads, dtype=torch.float64)
    group_mean, per_head, index_lse = (torch.zeros(queries, groups, dtype=torch.float64) for _ in range(3))
    for query in range(queries):
        for group in range(groups):
            blocks = None if block_ids is None else block_ids[query, group].tolist()
            tokens = visible_tokens(layout, query, blocks, block_size)
            index_scores = [
                dot(index_q[query, group], index_k[token]) / math.sqrt(index_q.shape[2]) for token in tokens
            ]
            student = softmax(index_scores)
            index_lse[query, group] = logsumexp(index_scores)
            own_heads = range(group * heads // groups, (group + 1) * heads // groups)
            mean = [0.0] * len(tokens)
            for head in own_heads:
                scores = [dot(q[query, head], k[token, group]) / math.sqrt(dim) for token in tokens]
                weights = softmax(scores)
                lse[query, head] = logsumexp(scores)
                for place, token in enumerate(tokens):
                    out[query, head] += weights[place] * v[token, group].double()
                    mean[place] += weights[place] / len(own_heads)
                per_head[query, group] += divergence(weights, student) / len(own_heads)
            group_mean[query, group] = divergence(mean, student)
    return BruteForceAttention(out, lse, group_mean, per_head, index_lse)


def divergence(teacher: list[float], student: list[float]) -> float:
    return sum(p * math.log(p / s) for p, s in zip(teacher, student, strict=True) if p > 0)
