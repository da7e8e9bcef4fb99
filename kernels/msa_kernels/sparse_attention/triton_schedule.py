"""Which queries chose a block: block_ids turned around, and cut into pieces of work for the kernels.

Neighbouring queries mostly choose the same blocks. Entries that enough queries of a tile share go to a kernel
that keeps the queries and streams the blocks (triton_shared.py); the *rest*, and all of them in the backward
pass, to kernels that keep a block and stream the queries that chose it. Everything here is computed on the
device from tensors of host-known sizes, so no call waits for the GPU and none is compiled again for another
selection.

Words: an *entry* is one (query, group, slot) of block_ids, number (query * groups + group) * slots + slot.
A *bucket* is one block of keys for one group, number group * blocks + block. An *item* is a run of at most
``entries_per_item`` entries of one bucket: the work of one program. A *tile* is a run of queries.

Letters in shapes: Q queries, K keys, Hkv groups, N blocks of all documents, E entries, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout

# Kinds of used entries in the order in which they lie within a bucket, and values of ``Schedule.kind``.
REST, SHARED, OWN, UNUSED = 0, 1, 2, 3
KINDS = 3
# Rows of a tile (queries times heads of the group, rounded up to a power of two), and the most queries: one
# bit of an int32 for each.
TILE_ROWS = 128
MAX_TILE_QUERIES = 32
# Where the numbers of _sums_over_equal_blocks begin. Sums over at most 2,048 lanes, MAX_TILE_QUERIES times
# 64 slots, stay below 2^43 for the masks and at 32 for own blocks.
OWN_BIT, COUNT_BIT = 44, 50
# An entry is shared if at least this part of its tile's queries chose its block.
SHARED_PART = 1 / 2


@triton.jit(do_not_specialize=["num_blocks"])
def _block_table_kernel(
    document_offsets, first_key, num_keys, first_block, num_blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """One program per document: its first block, and its rows of first_key and num_keys.

    The last one also writes the rows behind all documents, where the first is that behind all keys.
    """
    document = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    before = tl.zeros([WIDTH], dtype=tl.int32)
    for start in tl.range(0, document, WIDTH):
        other = start + lane
        exists = other < document
        begin = tl.load(document_offsets + other, mask=exists, other=0)
        end = tl.load(document_offsets + other + 1, mask=exists, other=0)
        before += tl.cdiv(end - begin, BLOCK)
    first = tl.sum(before, 0)
    tl.store(first_block + document, first)
    begin = tl.load(document_offsets + document)
    end = tl.load(document_offsets + document + 1)
    own_end = first + tl.cdiv(end - begin, BLOCK)
    last = tl.where(document == tl.num_programs(0) - 1, num_blocks, own_end)
    for start in tl.range(first, last, WIDTH):
        block = start + lane
        key = tl.minimum(begin + (block - first) * BLOCK, end)
        tl.store(first_key + block, key, mask=block < last)
        tl.store(num_keys + block, tl.minimum(end - key, BLOCK), mask=block < last)


def _tile_queries(group: int) -> int:
    return min(MAX_TILE_QUERIES, TILE_ROWS // triton.next_power_of_2(group))


def _lanes(group: int, slots: int) -> int:
    """Entries that `_sort_entries_kernel` sorts at once."""
    return _tile_queries(group) * triton.next_power_of_2(slots)


def max_blocks(group: int, slots: int) -> int:
    """Blocks whose numbers `_sums_over_equal_blocks` can sort as int32, beside a lane and a bit."""
    return 2**31 // (2 * _lanes(group, slots)) - 1


@triton.jit
def _sorted(x, LANES: tl.constexpr):
    """x [LANES] in ascending order, by a bitonic network; so does tl.sort, slowly in the interpreter."""
    lane = tl.arange(0, LANES)
    for log_size in tl.static_range(1, 31):
        if (1 << log_size) <= LANES:
            for step in tl.static_range(log_size):
                distance = 1 << (log_size - 1 - step)
                other = tl.gather(x, lane ^ distance, 0)
                takes_smaller = ((lane & distance) == 0) == ((lane & (1 << log_size)) == 0)
                x = tl.where(takes_smaller, tl.minimum(x, other), tl.maximum(x, other))
    return x


@triton.jit
def _sums_over_equal_blocks(
    block, is_own, scratch, LANES: tl.constexpr, PADDED_SLOTS: tl.constexpr,
    OWN_BIT: tl.constexpr, COUNT_BIT: tl.constexpr,
):  # fmt: skip
    """For each lane, over the lanes that name the same block, as one int64: from bit 0 the queries as a mask,
    from bit OWN_BIT how many have it as their own block, from bit COUNT_BIT how many queries there are.

    Lanes are sorted by block, equal ones add up to differences of one running sum, and the sums go back to
    where the lanes were: comparing all pairs took 40 % of the attention of groups of four heads.
    """
    lane = tl.arange(0, LANES)
    # By block, then lane; whether a lane is an own one travels along.
    ranked = _sorted((block * LANES + lane) * 2 + is_own.to(tl.int32), LANES)
    before = tl.where(lane > 0, tl.gather(ranked, tl.maximum(lane - 1, 0), 0), -2 * LANES)
    after = tl.where(lane < LANES - 1, tl.gather(ranked, tl.minimum(lane + 1, LANES - 1), 0), -2 * LANES)
    ranked_lane = (ranked // 2) % LANES
    ranked_block, block_before, block_after = (
        ranked // (2 * LANES), before // (2 * LANES), after // (2 * LANES)
    )  # fmt: skip
    ranked_place = ranked_lane // PADDED_SLOTS
    # A query counts once, even if its row names a block twice.
    is_first = (ranked_block != block_before) | (ranked_place != (before // 2) % LANES // PADDED_SLOTS)
    one = tl.full([LANES], 1, dtype=tl.int64)
    own = (ranked % 2).to(tl.int64) << OWN_BIT
    running = tl.cumsum(tl.where(is_first, (one << ranked_place) + own + (one << COUNT_BIT), 0), 0)
    number = tl.cumsum((ranked_block != block_before).to(tl.int32), 0)
    tl.store(scratch + number - 1, running, mask=ranked_block != block_after)
    tl.debug_barrier()
    until = tl.load(scratch + number - 1)
    sums = until - tl.load(scratch + number - 2, mask=number > 1, other=0)
    tl.debug_barrier()
    tl.store(scratch + ranked_lane, sums)
    tl.debug_barrier()
    return tl.load(scratch + lane)


@triton.jit(do_not_specialize=["num_queries", "num_blocks", "least"])
def _sort_entries_kernel(
    block_ids, query_document, query_position, first_block, first_keys, order_key, kind, own_key, shared_key,
    shared_queries, num_shared, scratch, num_queries, num_blocks, least,
    SLOTS: tl.constexpr, PADDED_SLOTS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    MAX_SHARED: tl.constexpr, OWN_BIT: tl.constexpr, COUNT_BIT: tl.constexpr,
):  # fmt: skip
    """One program per tile and group: kind and order key of its entries, own_key, and its shared blocks.

    The order key is KINDS * bucket + kind; that of unused entries is above all others. scratch is int64, an
    element per lane of every program.
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(1)
    LANES: tl.constexpr = QUERIES * PADDED_SLOTS
    lane = tl.arange(0, LANES)
    place, slot = lane // PADDED_SLOTS, lane % PADDED_SLOTS
    query = tile * QUERIES + place
    inside = (query < num_queries) & (slot < SLOTS)
    entry = (query.to(tl.int64) * groups + group) * SLOTS + slot
    block = tl.load(block_ids + entry, mask=inside, other=-1)
    position = tl.load(query_position + query, mask=inside, other=0)
    own_block = position // BLOCK
    document = tl.load(query_document + query, mask=inside, other=0)
    document_block = tl.load(first_block + document)
    own_first_key = tl.load(first_keys + document_block + own_block)
    tl.store(own_key + query, own_first_key + position % BLOCK, mask=inside & (slot == 0) & (group == 0))
    # A block behind the query holds nothing that the query sees.
    used = (block >= 0) & (block <= own_block)
    key_block = tl.where(used, document_block + block, -1)

    sums = _sums_over_equal_blocks(
        tl.where(used, key_block, num_blocks), used & (block == own_block),
        scratch + (tile.to(tl.int64) * groups + group) * LANES, LANES, PADDED_SLOTS, OWN_BIT, COUNT_BIT,
    )  # fmt: skip
    members = (sums & ((1 << OWN_BIT) - 1)).to(tl.int32)
    # A block that is the own one of some query is shared: it alone needs a causal mask, and gets it there.
    own_of_any = (sums >> OWN_BIT) & ((1 << (COUNT_BIT - OWN_BIT)) - 1)
    count = sums >> COUNT_BIT

    shared = used & ((count >= least) | (own_of_any != 0))
    entry_kind = tl.where(shared, tl.where(block == own_block, 2, 1), 0)
    bucket = group * num_blocks + key_block
    key = tl.where(used, 3 * bucket + entry_kind, 3 * groups * num_blocks)
    tl.store(order_key + entry, key, mask=inside)
    tl.store(kind + entry, tl.where(used, entry_kind, 3).to(tl.int8), mask=inside)

    # The first member of a block lists it. Only a row that names a block twice could exceed the bound.
    lists = shared & ((members & ((1 << place) - 1)) == 0)
    number = tl.cumsum(lists.to(tl.int32), 0) - 1
    lists = lists & (number < MAX_SHARED)
    tile_group = tile.to(tl.int64) * groups + group
    row = tile_group * MAX_SHARED + number
    block_first_key = tl.load(first_keys + key_block, mask=lists, other=0)
    tl.store(shared_key + row, block_first_key, mask=lists)
    tl.store(shared_queries + row, members, mask=lists)
    tl.store(num_shared + tile_group, tl.sum(lists.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_buckets", "max_extra_items", "entries_per_item"])
def _number_extra_items_kernel(
    edges, last_extra, extra_bucket, num_buckets, max_extra_items, entries_per_item, WIDTH: tl.constexpr
):
    """A single program: the running sum of the buckets' extra items, and the bucket of each of these."""
    lane = tl.arange(0, WIDTH)
    before = 0
    for start in tl.range(0, num_buckets, WIDTH):
        bucket = start + lane
        exists = bucket < num_buckets
        begin = tl.load(edges + 3 * bucket, mask=exists, other=0)
        end = tl.load(edges + 3 * bucket + 3, mask=exists, other=0)
        extras = tl.maximum(tl.cdiv(end - begin, entries_per_item) - 1, 0)
        last = before + tl.cumsum(extras, 0)
        tl.store(last_extra + bucket, last, mask=exists)
        for number in tl.range(0, tl.max(extras, 0)):
            tl.store(extra_bucket + last - extras + number, bucket, mask=number < extras)
        before += tl.sum(extras, 0)
    none = tl.full([WIDTH], -1, dtype=tl.int32)
    for start in tl.range(before, max_extra_items, WIDTH):
        tl.store(extra_bucket + start + lane, none, mask=start + lane < max_extra_items)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyBlockTable:
    """All documents' blocks as one list, without their keys.

    N is the upper bound K // B + D, known on the host; the blocks behind the last document are empty.

    Attributes:
        first_key: int32 [N], packed number of each block's first key.
        num_keys: int32 [N], keys in each block, 0 .. B.
        first_block: int32 [D], the place of each document's block 0 in the list.
    """

    first_key: Tensor
    num_keys: Tensor
    first_block: Tensor

    @staticmethod
    def size(layout: DocumentLayout, num_keys: int, block_size: int) -> int:
        """Rows of the table: as many blocks as there can be, known without a look at the documents."""
        return num_keys // block_size + layout.num_documents

    @classmethod
    def build(cls, layout: DocumentLayout, num_keys: int, block_size: int) -> KeyBlockTable:
        """Cuts ``num_keys`` keys into blocks of ``block_size`` tokens, aligned to their documents."""
        documents = layout.num_documents
        num_blocks = cls.size(layout, num_keys, block_size)
        first_key, keys_left, first_block = (
            torch.empty(size, dtype=torch.int32, device=layout.device)
            for size in (num_blocks, num_blocks, documents)
        )
        _block_table_kernel[(documents,)](
            layout.document_offsets, first_key, keys_left, first_block, num_blocks,
            BLOCK=block_size, WIDTH=128, num_warps=4,
        )  # fmt: skip
        return cls(first_key=first_key, num_keys=keys_left, first_block=first_block)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The work of the kernels for one chunk of queries.

    Items 0 .. buckets - 1 are the first of each bucket, empty ones among them; behind those come the *extra*
    items of the buckets with more than ``entries_per_item`` entries. ``triton_tiles.find_item`` reads this.

    Attributes:
        entries: int32 [E], entries sorted by bucket; within a bucket by kind, REST, SHARED, OWN, and each of
            those in the order of the queries. Unused entries lie behind all buckets.
        edges: int32 [KINDS * Hkv * N + 1], where each kind of each bucket begins in ``entries``.
        last_extra: int32 [Hkv * N], running sum over the buckets of their extra items.
        extra_bucket: int32 [upper bound of the extra items], the bucket of each; -1 behind the last.
        kind: int8 [Q, Hkv, slots]: REST, SHARED, OWN (shared too, and the block holds the query), UNUSED.
        shared_key: int32 [T, Hkv, max], packed number of the first key of the blocks that a tile shares.
        shared_queries: int32 [T, Hkv, max], bit i: query i of the tile chose the block.
        num_shared: int32 [T, Hkv], length of those lists.
        tile_queries: queries in a tile.
        own_key: int32 [Q], packed number of the key at the query's own place.
        blocks: the blocks.
        block_size: B.
        entries_per_item: see above.
    """

    entries: Tensor
    edges: Tensor
    last_extra: Tensor
    extra_bucket: Tensor
    kind: Tensor
    shared_key: Tensor
    shared_queries: Tensor
    num_shared: Tensor
    tile_queries: int
    own_key: Tensor
    blocks: KeyBlockTable
    block_size: int
    entries_per_item: int

    @classmethod
    def build(
        cls,
        block_ids: Tensor,
        layout: DocumentLayout,
        blocks: KeyBlockTable,
        *,
        group: int,
        block_size: int,
        entries_per_item: int,
    ) -> Schedule:
        """Schedules the entries of ``block_ids``, int32 [Q, Hkv, slots], of ``group`` query heads each."""
        device = block_ids.device
        block_ids = block_ids.contiguous()
        queries, groups, slots = block_ids.shape
        num_entries = block_ids.numel()
        num_blocks = blocks.first_key.numel()

        tile_queries = _tile_queries(group)
        least = max(2, round(SHARED_PART * tile_queries))
        num_tiles = triton.cdiv(queries, tile_queries)
        max_shared = tile_queries * slots // least + tile_queries
        options = {"dtype": torch.int32, "device": device}
        order_key = torch.empty(num_entries, **options)
        kind = torch.empty(block_ids.shape, dtype=torch.int8, device=device)
        shared_key, shared_queries = (torch.empty(num_tiles, groups, max_shared, **options) for _ in range(2))
        num_shared = torch.empty(num_tiles, groups, **options)
        own_key = torch.empty(queries, **options)
        padded_slots = triton.next_power_of_2(slots)
        lanes = _lanes(group, slots)
        scratch = torch.empty(num_tiles * groups * lanes, dtype=torch.int64, device=device)
        _sort_entries_kernel[(num_tiles, groups)](
            block_ids, layout.query_document, layout.query_position, blocks.first_block, blocks.first_key,
            order_key, kind, own_key, shared_key, shared_queries, num_shared, scratch,
            queries, num_blocks, least,
            SLOTS=slots, PADDED_SLOTS=padded_slots, BLOCK=block_size, QUERIES=tile_queries,
            MAX_SHARED=max_shared, OWN_BIT=OWN_BIT, COUNT_BIT=COUNT_BIT,
            num_warps=max(1, min(8, lanes // 128)),
        )  # fmt: skip
        del scratch
        sorted_key, entries = order_key.sort(stable=True)
        num_buckets = groups * num_blocks
        edges = torch.arange(KINDS * num_buckets + 1, **options)
        edges = torch.searchsorted(sorted_key, edges, out_int32=True)
        max_extra_items = num_entries // entries_per_item
        last_extra, extra_bucket = (torch.empty(size, **options) for size in (num_buckets, max_extra_items))
        _number_extra_items_kernel[(1,)](
            edges, last_extra, extra_bucket, num_buckets, max_extra_items, entries_per_item,
            WIDTH=2048, num_warps=8,
        )  # fmt: skip
        return cls(
            entries=entries.to(torch.int32),
            edges=edges,
            last_extra=last_extra,
            extra_bucket=extra_bucket,
            kind=kind,
            shared_key=shared_key,
            shared_queries=shared_queries,
            num_shared=num_shared,
            tile_queries=tile_queries,
            own_key=own_key,
            blocks=blocks,
            block_size=block_size,
            entries_per_item=entries_per_item,
        )

    def flatten(self) -> tuple[list[Tensor], Callable[[Iterator[Tensor]], Schedule]]:
        """Its tensors, and what takes as many from an iterator and makes a schedule of them again.

        For ``ctx.save_for_backward``, which may move tensors away and hand back copies: the second result
        holds none of them.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "blocks"}
        own = [name for name, value in values.items() if isinstance(value, Tensor)]
        numbers = {name: value for name, value in values.items() if name not in own}
        of_blocks = [field.name for field in fields(KeyBlockTable)]

        def rebuild(tensors: Iterator[Tensor]) -> Schedule:
            return Schedule(
                **{name: next(tensors) for name in own},
                **numbers,
                blocks=KeyBlockTable(**{name: next(tensors) for name in of_blocks}),
            )

        saved = [values[name] for name in own] + [getattr(self.blocks, name) for name in of_blocks]
        return saved, rebuild

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """What the kernels that keep a block take: ``triton_tiles.find_item``'s, then entries and own_key."""
        blocks = self.blocks
        num_blocks, num_buckets = blocks.first_key.numel(), self.edges.numel() // KINDS
        items = (self.edges, self.last_extra, self.extra_bucket, blocks.first_key, blocks.num_keys)
        return (*items, num_blocks, num_buckets, self.entries_per_item, self.entries, self.own_key)

    @property
    def max_extra_items(self) -> int:
        """Upper bound of the number of extra items."""
        return self.extra_bucket.numel()

    @property
    def max_items(self) -> int:
        """Upper bound of the number of items: the grid of the kernels."""
        return self.edges.numel() // KINDS + self.max_extra_items
