"""Loads that the kernels of sparse_attention share.

Letters in shapes: K keys, Hkv groups, d head dim, B block size.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


@triton.jit
def load_key_tile(
    source, first_key, num_keys, group, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """The keys of one block and group: [B, d] of source [K, Hkv, d]; zeros behind the last key."""
    place = tl.arange(0, BLOCK)
    row = (first_key + place).to(tl.int64) * GROUPS + group
    pointers = source + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(pointers, mask=place[:, None] < num_keys, other=0.0)


@triton.jit
def load_gathered_rows(source, row, inside, DIM: tl.constexpr):
    """source[row], [rows, d]; zeros where not ``inside``."""
    pointers = source + row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def entries_of_rows(
    entries, start, end, group, GROUP: tl.constexpr, ENTRIES_PER_QUERY: tl.constexpr, ROWS: tl.constexpr
):
    """What the rows of a tile stand for; row i is head i % G of the entry at place start + i // G.

    Returns entry, query (int64), query head, and whether the row exists.
    """
    row = tl.arange(0, ROWS)
    place = start + row // GROUP
    inside = place < end
    entry = tl.load(entries + place, mask=inside, other=0)
    return entry, (entry // ENTRIES_PER_QUERY).to(tl.int64), group * GROUP + row % GROUP, inside


@triton.jit
def mean_over_heads(tile, GROUP: tl.constexpr):
    """Mean over the G neighbouring columns of each query position: [B, positions * G] -> [B, positions]."""
    if GROUP == 1:
        return tile
    split = tl.reshape(tile, [tile.shape[0], tile.shape[1] // GROUP, GROUP])
    return tl.sum(split, 2) / GROUP


@triton.jit
def add_key_gradient(
    gradient, partial, tile, extra, first_key, num_keys, group,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hands in an item's gradient [B, d] of its block's keys, without atomics, so that runs repeat bitwise.

    The first item of a bucket (extra -1) adds to gradient, fp32 [K, Hkv, d]: nobody else touches that part.
    The others write row ``extra`` of partial, fp32 [items, B, d]; ``sum_extra_items`` adds those in order.
    """
    place = tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    if extra < 0:
        row = (first_key + place).to(tl.int64) * GROUPS + group
        pointers = gradient + row[:, None] * DIM + dims[None, :]
        in_block = place[:, None] < num_keys
        tl.store(pointers, tl.load(pointers, mask=in_block, other=0.0) + tile, mask=in_block)
    else:
        row = extra.to(tl.int64) * BLOCK + place
        tl.store(partial + row[:, None] * DIM + dims[None, :], tile)
