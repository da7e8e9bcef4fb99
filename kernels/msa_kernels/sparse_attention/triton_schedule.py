"""Which queries chose a block: block_ids turned around, and cut into pieces of work for the kernels.

The kernels keep one block of keys and stream the queries that chose it. Everything here is computed on the
device from tensors of host-known sizes, so no call waits for the GPU and none is compiled again for another
selection.

Words: an *entry* is one (query, group, slot) of block_ids, number (query * groups + group) * slots + slot.
A *bucket* is one block of keys for one group, number group * blocks + block. An *item* is a run of at most
``entries_per_item`` entries of one bucket: the work of one program.

Letters in shapes: Q queries, K keys, Hkv groups, N blocks of all documents, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout

# Columns of ``Schedule.items``: 32 bytes, one memory sector, per item.
ITEM_FIELDS = 8


@triton.jit(do_not_specialize=["num_entries", "num_blocks"])
def _order_key_kernel(
    block_ids, query_document, query_position, first_block, order_key, used, num_entries, num_blocks,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Per entry: whether it is used, and its key 2 * bucket + (it is the query's own block); unused: last."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < num_entries
    query = entry // (GROUPS * SLOTS)
    group = (entry // SLOTS % GROUPS).to(tl.int32)
    block = tl.load(block_ids + entry, mask=inside, other=-1)
    own_block = tl.load(query_position + query, mask=inside, other=0) // BLOCK
    # A block behind the query holds nothing that the query sees.
    is_used = (block >= 0) & (block <= own_block)
    document = tl.load(query_document + query, mask=inside, other=0)
    bucket = group * num_blocks + tl.load(first_block + document, mask=inside, other=0) + block
    key = tl.where(is_used, 2 * bucket + (block == own_block).to(tl.int32), 2 * GROUPS * num_blocks)
    tl.store(order_key + entry, key, mask=inside)
    tl.store(used + entry, is_used.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["num_blocks", "entries_per_item"])
def _items_kernel(
    edges, last_item, last_extra, first_key, num_keys, items, num_blocks, entries_per_item,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per bucket: writes its rows of items, see ``Schedule.items``."""
    bucket = tl.program_id(0)
    begin, own_begin = tl.load(edges + 2 * bucket), tl.load(edges + 2 * bucket + 1)
    end = tl.load(edges + 2 * bucket + 2)
    count = tl.cdiv(end - begin, entries_per_item)
    first_item = tl.load(last_item + bucket) - count
    first_extra = tl.load(last_extra + bucket) - tl.maximum(count - 1, 0)
    block = bucket % num_blocks
    block_first_key, block_num_keys = tl.load(first_key + block), tl.load(num_keys + block)
    for start in tl.range(0, count, WIDTH):
        number = start + tl.arange(0, WIDTH)
        exists = number < count
        row = items + (first_item + number) * 8
        item_begin = begin + number * entries_per_item
        item_end = tl.minimum(item_begin + entries_per_item, end)
        tl.store(row, item_begin, mask=exists)
        tl.store(row + 1, tl.maximum(tl.minimum(own_begin, item_end), item_begin), mask=exists)
        tl.store(row + 2, item_end, mask=exists)
        tl.store(row + 3, tl.zeros_like(number) + block_first_key, mask=exists)
        tl.store(row + 4, tl.zeros_like(number) + block_num_keys, mask=exists)
        tl.store(row + 5, tl.zeros_like(number) + bucket // num_blocks, mask=exists)
        tl.store(row + 6, tl.where(number > 0, first_extra + number - 1, -1), mask=exists)


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

    @classmethod
    def build(cls, layout: DocumentLayout, num_keys: int, block_size: int) -> KeyBlockTable:
        """Cuts ``num_keys`` keys into blocks of ``block_size`` tokens, aligned to their documents."""
        offsets = layout.document_offsets
        blocks_of_document = (offsets.diff() + block_size - 1) // block_size
        end_block = blocks_of_document.cumsum(0, dtype=torch.int32)
        first_block = end_block - blocks_of_document
        num_blocks = num_keys // block_size + layout.num_documents
        block = torch.arange(num_blocks, dtype=torch.int32, device=layout.device)
        document = torch.searchsorted(end_block, block, right=True).clamp(max=layout.num_documents - 1)
        first_key = offsets[document] + (block - first_block[document]) * block_size
        keys_left = (offsets[document + 1] - first_key).clamp(0, block_size)
        return cls(first_key=first_key, num_keys=keys_left, first_block=first_block)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The work of the kernels for one chunk of queries.

    Attributes:
        entries: int32 [E], entries sorted by bucket; within a bucket those whose query lies in the block
            itself come last, each part in the order of the queries. Unused entries lie behind all buckets.
        items: int32 [max_items, 8], one row per item:
            0 first place in ``entries``; 1 first place whose query lies in the block itself, the only entries
            that need a causal mask; 2 place behind the last (not above column 0: no such item); 3 packed
            number of the block's first key; 4 keys in the block; 5 group; 6 row of the buffer for partial
            key gradients, -1 for the first item of a bucket, which owns the bucket's part of the gradient
            itself; 7 unused.
        last_extra_item: int32 [Hkv * N], running sum over the buckets of the items behind each first one. It
            is the end of a bucket's rows in the partial buffers, which begin where those of the bucket
            before end.
        max_extra_items: upper bound of the rows of the partial buffers.
        used: int8 [Q, Hkv, slots], 1 where the entry is in some bucket.
        place_in_block: int32 [Q], query position modulo the block size.
        blocks: the blocks.
        block_size: B.
    """

    entries: Tensor
    items: Tensor
    last_extra_item: Tensor
    max_extra_items: int
    used: Tensor
    place_in_block: Tensor
    blocks: KeyBlockTable
    block_size: int

    @classmethod
    def build(
        cls,
        block_ids: Tensor,
        query_document: Tensor,
        query_position: Tensor,
        blocks: KeyBlockTable,
        *,
        block_size: int,
        entries_per_item: int,
    ) -> Schedule:
        """Sorts the entries of ``block_ids``, int32 [Q, Hkv, slots], into buckets; cuts those into items."""
        device = block_ids.device
        block_ids = block_ids.contiguous()
        _, groups, slots = block_ids.shape
        num_entries = block_ids.numel()
        num_blocks = blocks.first_key.numel()
        num_buckets = groups * num_blocks

        order_key = torch.empty(num_entries, dtype=torch.int32, device=device)
        used = torch.empty(block_ids.shape, dtype=torch.int8, device=device)
        entries_per_program = 1024
        _order_key_kernel[(triton.cdiv(num_entries, entries_per_program),)](
            block_ids, query_document, query_position, blocks.first_block, order_key, used, num_entries,
            num_blocks, GROUPS=groups, SLOTS=slots, BLOCK=block_size, ENTRIES=entries_per_program,
        )  # fmt: skip
        sorted_key, entries = order_key.sort(stable=True)

        edges = torch.arange(2 * num_buckets + 1, dtype=torch.int32, device=device)
        edges = torch.searchsorted(sorted_key, edges, out_int32=True)
        items_of_bucket = (edges[2::2] - edges[:-1:2] + (entries_per_item - 1)) // entries_per_item
        counts = torch.stack([items_of_bucket, (items_of_bucket - 1).clamp(min=0)])
        last_item, last_extra = counts.cumsum(1, dtype=torch.int32).unbind()

        # Every bucket has at most one item that is not full.
        max_extra_items = num_entries // entries_per_item
        max_items = max_extra_items + min(num_buckets, num_entries)
        items = torch.zeros(max_items, ITEM_FIELDS, dtype=torch.int32, device=device)
        _items_kernel[(num_buckets,)](
            edges, last_item, last_extra, blocks.first_key, blocks.num_keys, items, num_blocks,
            entries_per_item, WIDTH=32, num_warps=1,
        )  # fmt: skip
        return cls(
            entries=entries.to(torch.int32),
            items=items,
            last_extra_item=last_extra,
            max_extra_items=max_extra_items,
            used=used,
            place_in_block=query_position % block_size,
            blocks=blocks,
            block_size=block_size,
        )

    @property
    def max_items(self) -> int:
        """Upper bound of the number of items: the grid of the kernels."""
        return self.items.shape[0]
