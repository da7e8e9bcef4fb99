"""Full causal attention of queries in any order and number: the backward kernels.

One kernel keeps a tile of queries and sums up their gradient over the keys, another keeps a tile of keys and
sums up theirs over the queries. Both compute the probabilities again: 7 products instead of 5, but no
atomics, so that runs repeat bitwise.

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
from msa_kernels.sparse_attention.triton_backward import row_products

# Query positions and keys of a tile, and how the compiler runs it.
QUERY_TILE = {"ROWS": 128, "KEYS": 64, "STAGES": 3, "num_warps": 8}
KEY_TILE = {"ROWS": 64, "KEYS": 64, "STAGES": 2, "num_warps": 4}


@triton.jit
def _add_query_gradient(
    q_tile, dout_tile, lse_log2, delta, key_tile, value_tile, visible, dq, scale_log2, MASKED: tl.constexpr
):
    """dq [ROWS, d] with dS K of these keys added, dS = P (dO V^T - delta)."""
    log_p = tl.dot(q_tile, tl.trans(key_tile)) * scale_log2 - lse_log2[:, None]
    if MASKED:
        log_p = tl.where(visible, log_p, float("-inf"))
    dp = tl.dot(dout_tile, tl.trans(value_tile))
    ds = tl.exp2(log_p) * (dp - delta[:, None])
    return tl.dot(ds.to(key_tile.dtype), key_tile, dq)


@triton.jit(do_not_specialize=["num_queries"])
def _query_gradient_kernel(
    q, k, v, dout, lse, delta, first_keys, last_keys, dq, num_queries, scale, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per query head and tile of places: dq [Q, Hq, d] = scale dS K.

    q, k, v, dout and dq are tensor descriptors, see ``rows_of_heads``.
    """
    head = tl.program_id(0)
    group = head // GROUP
    first_place = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    place = first_place + tl.arange(0, ROWS)
    first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
    q_tile = q.load([first_place, head * DIM])
    dout_tile = dout.load([first_place, head * DIM])
    row = place.to(tl.int64) * HEADS + head
    lse_log2 = tl.load(lse + row, mask=place < num_queries, other=0.0) * 1.4426950408889634
    row_delta = tl.load(delta + row, mask=place < num_queries, other=0.0)
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)

    begin = tl.min(first_key, 0)
    end = tl.max(last_key, 0) + 1
    common = tl.where(tl.max(first_key, 0) == begin, tl.min(last_key, 0) + 1 - begin, 0)
    begin_masked = begin + common // KEYS * KEYS
    for begin_key in tl.range(begin, begin_masked, KEYS, num_stages=STAGES):
        acc = _add_query_gradient(
            q_tile, dout_tile, lse_log2, row_delta, k.load([begin_key, group * DIM]),
            v.load([begin_key, group * DIM]), None, acc, scale_log2, False,
        )  # fmt: skip
    for begin_key in tl.range(begin_masked, end, KEYS):
        if some_see(begin_key, begin_key + KEYS, first_key, last_key):
            visible = sees(begin_key + tl.arange(0, KEYS), first_key, last_key)
            acc = _add_query_gradient(
                q_tile, dout_tile, lse_log2, row_delta, k.load([begin_key, group * DIM]),
                v.load([begin_key, group * DIM]), visible, acc, scale_log2, True,
            )  # fmt: skip
    dq.store([first_place, head * DIM], (acc * scale).to(dq.dtype))


@triton.jit
def _add_key_gradients(
    q, dout, lse, delta, first_keys, last_keys, key_tile, value_tile, key, dk, dv, head, begin, end,
    num_queries, scale_log2,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv [KEYS, d] with dS^T Q and P^T dO of one head and the places begin .. end added."""
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        place = start + tl.arange(0, ROWS)
        q_tile = q.load([start, head * DIM])
        dout_tile = dout.load([start, head * DIM])
        row = place.to(tl.int64) * HEADS + head
        lse_log2 = tl.load(lse + row, mask=place < num_queries, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + row, mask=place < num_queries, other=0.0)
        # Keys by rows: P and dS then go from registers into the products that sum over the queries.
        log_p = tl.dot(key_tile, tl.trans(q_tile)) * scale_log2 - lse_log2[None, :]
        if MASKED:
            first_key, last_key = load_intervals(first_keys, last_keys, place, num_queries)
            visible = (key[:, None] >= first_key[None, :]) & (key[:, None] <= last_key[None, :])
            log_p = tl.where(visible & (place < end)[None, :], log_p, float("-inf"))
        p = tl.exp2(log_p)
        dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv)
        dp = tl.dot(value_tile, tl.trans(dout_tile))
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit(do_not_specialize=["num_queries"])
def _key_gradient_kernel(
    q, k, v, dout, lse, delta, first_keys, last_keys, places_of_tile, dk, dv, num_queries, scale, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per group and key tile: dk, dv [K, Hkv, d] = scale dS^T Q, P^T dO over the group's heads.

    places_of_tile int32 [4, key tiles]: the places that see some key of the tile are column 0 .. column 3,
    those that see all of them column 1 .. column 2. q, k, v, dout, dk and dv are tensor descriptors.
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    key = tile * KEYS + tl.arange(0, KEYS)
    key_tile = k.load([tile * KEYS, group * DIM])
    value_tile = v.load([tile * KEYS, group * DIM])
    tiles = tl.num_programs(1)
    begin, end = tl.load(places_of_tile + tile), tl.load(places_of_tile + 3 * tiles + tile)
    begin_all = tl.load(places_of_tile + tiles + tile)
    end_all = tl.load(places_of_tile + 2 * tiles + tile)
    # In steps of ROWS from begin; without any place that sees all keys, everything is masked.
    begin_all = tl.minimum(begin + tl.cdiv(begin_all - begin, ROWS) * ROWS, end)
    end_all = begin_all + tl.maximum(end_all - begin_all, 0) // ROWS * ROWS
    sum_dk = tl.zeros([KEYS, DIM], dtype=tl.float32)
    sum_dv = tl.zeros([KEYS, DIM], dtype=tl.float32)
    for head in tl.range(group * GROUP, group * GROUP + GROUP):
        sum_dk, sum_dv = _add_key_gradients(
            q, dout, lse, delta, first_keys, last_keys, key_tile, value_tile, key, sum_dk, sum_dv,
            head, begin, begin_all, num_queries, scale_log2, HEADS, DIM, ROWS, True, 1,
        )  # fmt: skip
        sum_dk, sum_dv = _add_key_gradients(
            q, dout, lse, delta, first_keys, last_keys, key_tile, value_tile, key, sum_dk, sum_dv,
            head, begin_all, end_all, num_queries, scale_log2, HEADS, DIM, ROWS, False, STAGES,
        )  # fmt: skip
        sum_dk, sum_dv = _add_key_gradients(
            q, dout, lse, delta, first_keys, last_keys, key_tile, value_tile, key, sum_dk, sum_dv,
            head, end_all, end, num_queries, scale_log2, HEADS, DIM, ROWS, True, 1,
        )  # fmt: skip
    dk.store([tile * KEYS, group * DIM], (sum_dk * scale).to(dk.dtype))
    dv.store([tile * KEYS, group * DIM], sum_dv.to(dv.dtype))


def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    queries: SortedQueries,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, by place, and of k and v, in their dtypes.

    Args:
        q: [Q, Hq, d]; everything here by place, contiguous and aligned. Q is 1 or more.
        k: [K, Hkv, d].
        v: [K, Hkv, d].
        out: [Q, Hq, d].
        lse: fp32 [Q, Hq], natural log.
        dout: [Q, Hq, d], upstream gradient.
        queries: the Q queries.
        softmax_scale: factor on the scores.
    """
    num_queries, heads, dim = q.shape
    num_keys, groups, _ = k.shape
    group = heads // groups
    delta = row_products(out, dout)
    intervals = (queries.first_key, queries.last_key)
    scales = (softmax_scale, softmax_scale * LOG2E)
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    rows, keys = QUERY_TILE["ROWS"], QUERY_TILE["KEYS"]
    _query_gradient_kernel[(heads, triton.cdiv(num_queries, rows))](
        rows_of_heads(q, rows), rows_of_heads(k, keys), rows_of_heads(v, keys), rows_of_heads(dout, rows),
        lse, delta, *intervals, rows_of_heads(dq, rows), num_queries, *scales,
        HEADS=heads, GROUP=group, DIM=dim, **QUERY_TILE,
    )  # fmt: skip
    rows, keys = KEY_TILE["ROWS"], KEY_TILE["KEYS"]
    key_tiles = triton.cdiv(num_keys, keys)
    _key_gradient_kernel[(groups, key_tiles)](
        rows_of_heads(q, rows), rows_of_heads(k, keys), rows_of_heads(v, keys), rows_of_heads(dout, rows),
        lse, delta, *intervals, _places_of_key_tiles(queries, key_tiles, keys), rows_of_heads(dk, keys),
        rows_of_heads(dv, keys), num_queries, *scales, HEADS=heads, GROUP=group, DIM=dim, **KEY_TILE,
    )  # fmt: skip
    return dq, dk, dv


def _places_of_key_tiles(queries: SortedQueries, key_tiles: int, tile_keys: int) -> Tensor:
    """int32 [4, tiles]; see ``_key_gradient_kernel``."""
    first = torch.arange(key_tiles, dtype=torch.int32, device=queries.last_key.device) * tile_keys
    last = first + (tile_keys - 1)
    ends_behind_first = torch.searchsorted(queries.last_key, first, out_int32=True)
    ends_behind_last = torch.searchsorted(queries.last_key, last, out_int32=True)
    starts_by_first = torch.searchsorted(queries.first_key, first, right=True, out_int32=True)
    starts_by_last = torch.searchsorted(queries.first_key, last, right=True, out_int32=True)
    return torch.stack([ends_behind_first, ends_behind_last, starts_by_first, starts_by_last])
