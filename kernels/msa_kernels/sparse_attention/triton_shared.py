"""Attention over the blocks that neighbouring queries share: the queries stay, the blocks come by.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, T tiles of queries (see triton_schedule.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_tiles import LOG2E, load_gathered_rows

# Keys that a step of the loop takes, at most a block, and how the compiler runs it. With no more than 128
# registers a thread, two programs share a multiprocessor: one's softmax runs beside the other's products.
TILE = {"KEYS": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}


@triton.jit(do_not_specialize=["num_queries", "total_keys"])
def _attend_shared_kernel(
    q, k, v, shared_key, shared_queries, num_shared, own_key, out, lse, num_queries, total_keys, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, MAX_SHARED: tl.constexpr,
):  # fmt: skip
    """One program per tile and group: out and lse (0 and -inf for queries that share nothing)."""
    tile, group = tl.program_id(0), tl.program_id(1)
    GROUPS: tl.constexpr = HEADS // GROUP
    PADDED_GROUP: tl.constexpr = triton.next_power_of_2(GROUP)
    ROWS: tl.constexpr = QUERIES * PADDED_GROUP
    STEPS: tl.constexpr = BLOCK // KEYS
    row = tl.arange(0, ROWS)
    place = row // PADDED_GROUP
    head = row % PADDED_GROUP
    query = tile * QUERIES + place
    inside = (query < num_queries) & (head < GROUP)
    source = query.to(tl.int64) * HEADS + group * GROUP + head
    q_tile = load_gathered_rows(q, source, inside, DIM)
    last_key = tl.load(own_key + query, mask=inside, other=0)
    tile_group = tile * GROUPS + group
    first = tile_group.to(tl.int64) * MAX_SHARED
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)

    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for step in tl.range(0, tl.load(num_shared + tile_group) * STEPS):
        first_key = tl.load(shared_key + first + step // STEPS) + step % STEPS * KEYS
        chose = (tl.load(shared_queries + first + step // STEPS) >> place) & 1
        # Keys of the next document lie behind all queries that chose the block.
        key = first_key + keys
        pointers = (key.to(tl.int64) * GROUPS + group)[:, None] * DIM + dims[None, :]
        exists = (key < total_keys)[:, None]
        key_tile = tl.load(k + pointers, mask=exists, other=0.0)
        value_tile = tl.load(v + pointers, mask=exists, other=0.0)
        scores = tl.dot(q_tile, tl.trans(key_tile))
        num_visible = tl.where(chose != 0, last_key - first_key + 1, 0)
        scores = tl.where(keys[None, :] < num_visible[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top > float("-inf"), new_top, 0.0) * scale_log2
        weights = tl.exp2(scores * scale_log2 - safe_top[:, None])
        fade = tl.exp2(top * scale_log2 - safe_top)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * fade[:, None])
        top = new_top
    sees_any = total > 0
    factor = tl.where(sees_any, 1.0 / tl.where(sees_any, total, 1.0), 0.0)
    pointers = out + source[:, None] * DIM + dims[None, :]
    tl.store(pointers, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    log_total = top * scale_log2 + tl.log2(tl.where(sees_any, total, 1.0))
    tl.store(lse + source, log_total * 0.6931471805599453, mask=inside)


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, out: Tensor, lse: Tensor, *, softmax_scale: float
) -> None:
    """Attention of one chunk of queries over the blocks that each tile shares.

    Args:
        q: [Q, Hq, d], contiguous, as all tensors here.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        schedule: of these queries.
        out: [Q, Hq, d], written.
        lse: fp32 [Q, Hq], natural log, written.
        softmax_scale: factor on the scores.
    """
    num_tiles, groups, max_shared = schedule.shared_key.shape
    queries, heads, dim = q.shape
    _attend_shared_kernel[(num_tiles, groups)](
        q, k, v, schedule.shared_key, schedule.shared_queries, schedule.num_shared, schedule.own_key, out,
        lse, queries, k.shape[0], softmax_scale * LOG2E,
        HEADS=heads, GROUP=heads // groups, QUERIES=schedule.tile_queries, DIM=dim,
        BLOCK=schedule.block_size, MAX_SHARED=max_shared, **TILE,
    )  # fmt: skip
