"""Attention within each block that few queries of a tile chose, written for Hopper in Triton's Gluon.

It gives what ``triton_forward.attend_rest`` gives, to the bit. That kernel keeps one block and one
stream of queries per program; two programs fill a multiprocessor, and each waits for its products, its
softmax and its memory in turn. Here one program per multiprocessor runs for the whole launch:

- a warp finds the next item of the schedule and fetches the keys and values of its block (TMA, two stages);
- three consumers of four warps share the block. Each takes every third tile of 64 rows, fetches its queries a
  tile ahead (cp.async) and sends its outputs off (TMA), while the others compute.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from msa_kernels.sparse_attention.hopper_tiles import PART, boxes_of
from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_tiles import LOG2E, bounds_of_rest

# Rows of a score tile; consumers; tiles of queries that each holds; blocks that are held. At d = B = 128 they
# fill the shared memory of a multiprocessor.
ROWS, CONSUMERS, BUFFERS, STAGES = 64, 3, 2, 2
# Registers a thread: 16 warps start with 128, of which 12 then compute with 152 and the others keep 40.
REGISTERS, CONSUMER_REGISTERS, FETCH_REGISTERS = 128, 152, 40


@gluon.constexpr_function
def _query_layout(dim: int) -> Any:
    """How four warps fetch rows of dim elements: 16 bytes a thread, a row by neighbouring threads."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def _entries_to_fetch(entries, start, end, GROUP: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Entry of each row of the tile from ``start`` on, laid out as ``_fetch_queries`` needs it.

    Places behind the end repeat the last one: what they give is not stored.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, _query_layout(DIM))
    return gl.load(entries + gl.minimum(start + gl.arange(0, ROWS, layout=ROW) // GROUP, end - 1))


@gluon.jit
def _fetch_queries(
    tile, loaded, q, entry, group, HEADS: gl.constexpr, GROUP: gl.constexpr, ENTRIES_PER_QUERY: gl.constexpr
):
    """Starts to fetch a tile; ``loaded`` tells when it is there."""
    ROWS: gl.constexpr = tile.shape[0]
    DIM: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = _query_layout(DIM)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    source = entry // ENTRIES_PER_QUERY * HEADS + group * GROUP + row % GROUP
    offset = gl.expand_dims(source * DIM, 1) + gl.expand_dims(dims, 0)
    async_copy.async_copy_global_to_shared(tile, q + offset)
    async_copy.mbarrier_arrive(loaded, increment_count=False)


@gluon.jit
def _read(items, place):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(items.index(place).load(LAYOUT), 0)


@gluon.jit
def _read_item(items, stage):
    """begin, end and group of the item whose block a stage holds; of four warps."""
    return _read(items, stage * 3), _read(items, stage * 3 + 1), _read(items, stage * 3 + 2)


@gluon.jit
def _write_item(items, stage, begin, end, group):
    """What ``_read_item`` reads; of one warp."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    items.index(stage * 3).store(gl.full([1], begin, gl.int32, layout=LAYOUT))
    items.index(stage * 3 + 1).store(gl.full([1], end, gl.int32, layout=LAYOUT))
    items.index(stage * 3 + 2).store(gl.full([1], group, gl.int32, layout=LAYOUT))


@gluon.jit
def _fetch_blocks(
    k_blocks, v_blocks, edges, last_extra, extra_bucket, first_keys, num_blocks, num_buckets,
    entries_per_item, num_items, next_item, k_tiles, v_tiles, items, full, empty,
):  # fmt: skip
    """One warp. Writes items (begin, end, group), with begin = end behind the last; fetches keys and values.

    Programs take the next item when they get through with one: buckets differ in size.
    """
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    found = 0
    item = gl.program_id(0)
    while item < num_items:
        begin, end, first_key, group = bounds_of_rest(
            item, edges, last_extra, extra_bucket, first_keys, num_blocks, num_buckets, entries_per_item
        )
        if begin < end:
            stage = found % STAGES
            mbarrier.wait(empty.index(stage), (found // STAGES + 1) & 1)
            _write_item(items, stage, begin, end, group)
            mbarrier.expect(full.index(stage), 2 * BLOCK * DIM * 2)
            tma.async_copy_global_to_shared(
                k_blocks, [first_key, group * DIM], full.index(stage), k_tiles.index(stage)
            )
            tma.async_copy_global_to_shared(
                v_blocks, [first_key, group * DIM], full.index(stage), v_tiles.index(stage)
            )
            found += 1
        item = gl.atomic_add(next_item, 1) + gl.num_programs(0)
    stage = found % STAGES
    mbarrier.wait(empty.index(stage), (found // STAGES + 1) & 1)
    _write_item(items, stage, 0, 0, 0)
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _attend_tiles(
    consumer: gl.constexpr, tensors, shared, scale_log2, CONSUMERS: gl.constexpr, HEADS: gl.constexpr,
    GROUP: gl.constexpr, ENTRIES_PER_QUERY: gl.constexpr,
):  # fmt: skip
    """Four warps. Tiles ``consumer``, ``consumer + CONSUMERS``, ... of every item that this program takes."""
    q, out_rows, entries, partial_lse = tensors
    k_tiles, v_tiles, q_tiles, items, full, empty, loaded = shared
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    BUFFERS: gl.constexpr = q_tiles.shape[0] // CONSUMERS
    ROWS: gl.constexpr = q_tiles.shape[1]
    DIM: gl.constexpr = q_tiles.shape[2]
    PART: gl.constexpr = out_rows.block_shape[1]
    PARTS: gl.constexpr = DIM // PART
    POSITIONS: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    # The memory of q_tiles again, cut into what one position's heads take of one part.
    slabs = q_tiles._reinterpret(
        dtype, [CONSUMERS * BUFFERS * PARTS * POSITIONS, GROUP, PART], out_rows.layout
    )
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    stage = 0
    found = 0
    count = 0
    mbarrier.wait(full.index(0), 0)
    begin, end, group = _read_item(items, 0)
    start = begin + consumer * POSITIONS
    if begin < end:
        first = consumer * BUFFERS
        to_fetch = _entries_to_fetch(entries, start, end, GROUP, ROWS, DIM)
        _fetch_queries(
            q_tiles.index(first), loaded.index(first), q, to_fetch, group, HEADS, GROUP, ENTRIES_PER_QUERY
        )
    while begin < end:
        # Loads whose values are needed only once this tile's first product is under way.
        next_begin = begin
        next_end = end
        next_group = group
        next_start = start + CONSUMERS * POSITIONS
        is_last = next_start >= end
        to_fetch = _entries_to_fetch(entries, next_start, end, GROUP, ROWS, DIM)
        place = start + row // GROUP
        entry = gl.load(entries + place, mask=place < end, other=0)
        buffer = consumer * BUFFERS + count % BUFFERS
        tile = q_tiles.index(buffer)
        mbarrier.wait(loaded.index(buffer), (count // BUFFERS) & 1)
        fence_async_shared()
        # No mask: the queries lie behind the block, which then has all its keys.
        scores = warpgroup_mma(
            tile, k_tiles.index(stage).permute((1, 0)),
            gl.zeros([ROWS, BLOCK], gl.float32, layout=SCORES), use_acc=False, is_async=True,
        )  # fmt: skip
        # Meanwhile the next tile, of this item or the next. An item of few tiles gives some consumers none:
        # they compute one whose places all lie behind the end.
        if is_last:
            found += 1
            next_stage = found % STAGES
            mbarrier.wait(full.index(next_stage), (found // STAGES) & 1)
            next_begin, next_end, next_group = _read_item(items, next_stage)
            next_start = next_begin + consumer * POSITIONS
            if next_begin < next_end:
                to_fetch = _entries_to_fetch(entries, next_start, next_end, GROUP, ROWS, DIM)
        if next_begin < next_end:
            # It takes the buffer of the tile before, once that has left it.
            tma.store_wait(0)
            gl.thread_barrier()
            next_buffer = consumer * BUFFERS + (count + 1) % BUFFERS
            _fetch_queries(
                q_tiles.index(next_buffer), loaded.index(next_buffer), q, to_fetch, next_group, HEADS, GROUP,
                ENTRIES_PER_QUERY,
            )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=(scores,))
        top = gl.max(scores, 1) * scale_log2
        weights = gl.exp2(scores * scale_log2 - gl.expand_dims(top, 1))
        total = gl.sum(weights, 1)
        out = warpgroup_mma(
            gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2)), v_tiles.index(stage),
            gl.zeros([ROWS, DIM], gl.float32, layout=OUT), use_acc=False, is_async=True,
        )  # fmt: skip
        gl.store(partial_lse + entry * GROUP + row % GROUP, top + gl.log2(total), mask=place < end)
        out = warpgroup_mma_wait(0, deps=(out,))
        inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))
        tile.store((out * gl.expand_dims(inverse, 1)).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        if is_last:
            mbarrier.arrive(empty.index(stage), count=1)
        for position in gl.static_range(POSITIONS):
            if start + position < end:
                out_row = gl.load(entries + start + position) * GROUP
                for part in gl.static_range(PARTS):
                    slab = slabs.index((buffer * PARTS + part) * POSITIONS + position)
                    tma.async_copy_shared_to_global(out_rows, [out_row, part * PART], slab)
        begin = next_begin
        end = next_end
        group = next_group
        start = next_start
        stage = found % STAGES
        count += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item", "num_items"])
def _attend_rest_hopper_kernel(
    q, k_blocks, v_blocks, out_rows, partial_lse, edges, last_extra, extra_bucket, first_keys, keys_in_block,
    num_blocks, num_buckets, entries_per_item, entries, own_key, num_items, next_item, scale_log2,
    HEADS: gl.constexpr, GROUP: gl.constexpr, ENTRIES_PER_QUERY: gl.constexpr, DIM: gl.constexpr,
    BLOCK: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, BUFFERS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as multiprocessors. next_item: int32 [1], 0."""
    dtype: gl.constexpr = k_blocks.dtype
    layout: gl.constexpr = k_blocks.layout
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], layout)
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS * BUFFERS, ROWS, DIM], layout)
    items = gl.allocate_shared_memory(gl.int32, [STAGES * 3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [CONSUMERS * BUFFERS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    for buffer in gl.static_range(CONSUMERS * BUFFERS):
        mbarrier.init(loaded.index(buffer), count=128)  # threads of a consumer
    fence_async_shared()
    gl.thread_barrier()
    tensors = (q, out_rows, entries, partial_lse)
    shared = (k_tiles, v_tiles, q_tiles, items, full, empty, loaded)
    gl.static_assert(CONSUMERS == 3)
    gl.warp_specialize(
        [
            (_attend_tiles, (0, tensors, shared, scale_log2, CONSUMERS, HEADS, GROUP, ENTRIES_PER_QUERY)),
            (_attend_tiles, (1, tensors, shared, scale_log2, CONSUMERS, HEADS, GROUP, ENTRIES_PER_QUERY)),
            (_attend_tiles, (2, tensors, shared, scale_log2, CONSUMERS, HEADS, GROUP, ENTRIES_PER_QUERY)),
            (
                _fetch_blocks,
                (
                    k_blocks, v_blocks, edges, last_extra, extra_bucket, first_keys, num_blocks, num_buckets,
                    entries_per_item, num_items, next_item, k_tiles, v_tiles, items, full, empty,
                ),
            ),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def attend_rest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    partial_out: Tensor,
    partial_lse: Tensor,
    *,
    softmax_scale: float,
) -> None:
    """See ``triton_forward.attend_rest``."""
    heads, dim = q.shape[1:]
    keys, groups = k.shape[:2]
    group, block_size = heads // groups, schedule.block_size
    num_programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _attend_rest_hopper_kernel[(num_programs,)](
        q,
        boxes_of(k, keys, groups * dim, [block_size, dim]),
        boxes_of(v, keys, groups * dim, [block_size, dim]),
        boxes_of(partial_out, partial_out.shape[0] * group, dim, [group, PART]),
        partial_lse, *schedule.arguments, schedule.max_items,
        torch.zeros(1, dtype=torch.int32, device=q.device), softmax_scale * LOG2E,
        HEADS=heads, GROUP=group, ENTRIES_PER_QUERY=groups * schedule.kind.shape[2], DIM=dim,
        BLOCK=block_size, ROWS=ROWS, CONSUMERS=CONSUMERS, BUFFERS=BUFFERS, STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, FETCH_REGISTERS=FETCH_REGISTERS,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
