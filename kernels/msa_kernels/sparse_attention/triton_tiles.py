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
def _locate_item(number, edges, last_extra, extra_bucket, num_buckets, entries_per_item):
    """Bucket of an item (0 if it has none), whether it has one, its first entry, and how many extra items
    lie before the bucket's."""
    is_first = number < num_buckets
    extra = number - num_buckets
    bucket = tl.where(is_first, number, tl.load(extra_bucket + extra, mask=extra >= 0, other=0))
    exists = bucket >= 0
    bucket = tl.maximum(bucket, 0)
    first_extra = tl.load(last_extra + bucket - 1, mask=bucket > 0, other=0)
    begin = tl.load(edges + 3 * bucket) + tl.where(is_first, 0, extra - first_extra + 1) * entries_per_item
    return bucket, exists, begin, first_extra


@triton.jit
def find_item(
    edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
):
    """The item of this program, see ``Schedule``.

    Returns its first entry, the first behind those of kind REST, the first of kind OWN, the end (not above
    the first: nothing to do); packed number of the block's first key, keys in the block, group; row of the
    buffers for partial key gradients, -1 for the only item of a bucket.
    """
    number = tl.program_id(0)
    bucket, exists, begin, first_extra = _locate_item(
        number, edges, last_extra, extra_bucket, num_buckets, entries_per_item
    )
    bucket_begin, bucket_end = tl.load(edges + 3 * bucket), tl.load(edges + 3 * bucket + 3)
    end = tl.where(exists, tl.minimum(begin + entries_per_item, bucket_end), begin)
    rest_end = tl.minimum(tl.maximum(tl.load(edges + 3 * bucket + 1), begin), end)
    own_begin = tl.minimum(tl.maximum(tl.load(edges + 3 * bucket + 2), begin), end)
    # First items lie behind the extra ones in the buffers, each where the number of its first extra one says.
    in_front = tl.num_programs(0) - num_buckets + first_extra
    row = tl.where(number < num_buckets, in_front, number - num_buckets)
    is_only = exists & (bucket_end - bucket_begin <= entries_per_item)
    row = tl.where(is_only, -1, row)
    block = bucket % num_blocks
    return (
        begin, rest_end, own_begin, end, tl.load(first_keys + block), tl.load(keys_in_block + block),
        bucket // num_blocks, row,
    )  # fmt: skip


@triton.jit
def bounds_of_rest(
    number, edges, last_extra, extra_bucket, first_keys, num_blocks, num_buckets, entries_per_item
):
    """What an item has of kind REST: first entry, end, packed number of the block's first key, group."""
    bucket, exists, begin, _ = _locate_item(
        number, edges, last_extra, extra_bucket, num_buckets, entries_per_item
    )
    end = tl.minimum(begin + entries_per_item, tl.load(edges + 3 * bucket + 1))
    return (
        begin,
        tl.where(exists, end, begin),
        tl.load(first_keys + bucket % num_blocks),
        bucket // num_blocks,
    )


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
    """What the rows of a tile stand for; row i is head i % P of the entry at place start + i // P.

    P is G rounded up to a power of two, as sizes of tiles are. The rows of heads from G on do not exist.

    Returns entry, query (int64), head within the group, and whether the row exists.
    """
    PADDED_GROUP: tl.constexpr = triton.next_power_of_2(GROUP)
    row = tl.arange(0, ROWS)
    place = start + row // PADDED_GROUP
    head = row % PADDED_GROUP
    inside = (place < end) & (head < GROUP)
    entry = tl.load(entries + place, mask=inside, other=0)
    return entry, (entry // ENTRIES_PER_QUERY).to(tl.int64), head, inside


@triton.jit
def mean_over_heads(tile, GROUP: tl.constexpr):
    """Mean over the heads of each query position: [B, positions * P] -> [B, positions], with P as in
    ``entries_of_rows``. Columns of heads that do not exist are 0.
    """
    if GROUP == 1:
        return tile
    PADDED_GROUP: tl.constexpr = triton.next_power_of_2(GROUP)
    split = tl.reshape(tile, [tile.shape[0], tile.shape[1] // PADDED_GROUP, PADDED_GROUP])
    return tl.sum(split, 2) / GROUP


@triton.jit
def hand_in_key_gradient(
    gradient, partial, tile, row, first_key, num_keys, group, is_first_chunk,
    GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hands in an item's gradient [B, d] of its block's keys, without atomics, so that runs repeat bitwise.

    The only item of a bucket (row -1) writes gradient [K, Hkv, d] in the first chunk of queries and adds to
    it in the others: nobody else touches that part. Other items write their row of partial, fp32 [items, B,
    d]; ``sum_items`` adds those in order.
    """
    place = tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    if row < 0:
        key = (first_key + place).to(tl.int64) * GROUPS + group
        pointers = gradient + key[:, None] * DIM + dims[None, :]
        in_block = place[:, None] < num_keys
        before = tl.load(pointers, mask=in_block & (is_first_chunk == 0), other=0.0).to(tl.float32)
        tl.store(pointers, (before + tile).to(gradient.dtype.element_ty), mask=in_block)
    else:
        target = row.to(tl.int64) * BLOCK + place
        tl.store(partial + target[:, None] * DIM + dims[None, :], tile)
