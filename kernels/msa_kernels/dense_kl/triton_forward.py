"""Full causal attention of queries in any order and number: the forward kernel.

Letters in shapes: Q queries, K keys, Hq query heads, Hkv groups, d head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.dense_kl.triton_queries import (
    LOG2E,
    SortedQueries,
    load_intervals,
    rows_of_heads,
    sees,
    some_see,
)

# Query positions and keys of a tile, and how the compiler runs it.
TILE = {"ROWS": 128, "KEYS": 128, "STAGES": 3, "num_warps": 8}


@triton.jit
def _attend_to(q_tile, key_tile, value_tile, visible, out, top, total, scale_log2, MASKED: tl.constexpr):
    """One step of online softmax: out, top (units of log2) and total with these keys taken in."""
    scores = tl.dot(q_tile, tl.trans(key_tile)) * scale_log2
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Rows that have seen nothing yet: -inf less -inf would be NaN.
    base = tl.where(new_top > float("-inf"), new_top, 0.0)
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    out = tl.dot(weights.to(value_tile.dtype), value_tile, out * shrink[:, None])
    return out, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_queries"])
def _attend_kernel(
    q, k, v, first_keys, last_keys, out, lse, num_queries, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per query head and tile of places: out [Q, Hq, d] and lse fp32 [Q, Hq], natural log.

    q, k, v and out are tensor descriptors, see ``rows_of_heads``.
    """
    head = tl.program_id(0)
    group = head // GROUP
    # The last tiles see the most keys: they start first.
    first_place = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    place = first_place + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    q_tile = q.load([first_place, head * DIM])
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    begin = tl.min(first_key, 0)
    end = tl.max(last_key, 0) + 1
    # Keys that all places of the tile see, in whole tiles; none if it spans several documents.
    common = tl.where(tl.max(first_key, 0) == begin, tl.min(last_key, 0) + 1 - begin, 0)
    begin_masked = begin + common // KEYS * KEYS
    for begin_key in tl.range(begin, begin_masked, KEYS, num_stages=STAGES):
        acc, top, total = _attend_to(
            q_tile, k.load([begin_key, group * DIM]), v.load([begin_key, group * DIM]), None, acc, top, total,
            scale_log2, False,
        )  # fmt: skip
    for begin_key in tl.range(begin_masked, end, KEYS):
        if some_see(begin_key, begin_key + KEYS, first_key, last_key):
            visible = sees(begin_key + tl.arange(0, KEYS), first_key, last_key)
            acc, top, total = _attend_to(
                q_tile, k.load([begin_key, group * DIM]), v.load([begin_key, group * DIM]), visible, acc, top,
                total, scale_log2, True,
            )  # fmt: skip
    out.store([first_place, head * DIM], (acc / total[:, None]).to(out.dtype))
    row = place.to(tl.int64) * HEADS + head
    tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453, mask=place < num_queries)


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: SortedQueries, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query to all keys it sees.

    Args:
        q: [Q, Hq, d]; everything here by place, contiguous and aligned. Q is 1 or more.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        queries: the Q queries.
        softmax_scale: factor on the scores.

    Returns:
        out, [Q, Hq, d] in the dtype of q, and lse, fp32 [Q, Hq], natural log.
    """
    num_queries, heads, dim = q.shape
    groups = k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
    _attend_kernel[(heads, triton.cdiv(num_queries, TILE["ROWS"]))](
        rows_of_heads(q, TILE["ROWS"]), rows_of_heads(k, TILE["KEYS"]), rows_of_heads(v, TILE["KEYS"]),
        queries.first_key, queries.last_key, rows_of_heads(out, TILE["ROWS"]), lse, num_queries,
        softmax_scale * LOG2E, HEADS=heads, GROUP=heads // groups, DIM=dim, **TILE,
    )  # fmt: skip
    return out, lse
