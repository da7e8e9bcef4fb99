"""Attention over the blocks that neighbouring queries share, written for Hopper in Triton's Gluon.

It computes what triton_shared.py does. There, two programs share a multiprocessor so that one's softmax runs
beside the other's products. Here one program per multiprocessor takes tile after tile:

- a warp fetches the queries of the next tile and the keys and values of the next blocks (TMA);
- two consumers of four warps take 64 rows of the tile each. While the tensor cores multiply the weights of
  one block with its values, a consumer computes the weights of the next.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, T tiles of queries (see triton_schedule.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from msa_kernels.sparse_attention.hopper_tiles import PART, boxes_of, release
from msa_kernels.sparse_attention.triton_schedule import Schedule
from msa_kernels.sparse_attention.triton_tiles import LOG2E

# Rows of a consumer, consumers, tiles of queries and blocks that are held. At d = B = 128 they take 192 KB of
# shared memory, and consumers x rows are a tile of the schedule (triton_schedule.TILE_ROWS).
ROWS, CONSUMERS, BUFFERS, STAGES = 64, 2, 2, 2
# Registers a thread: 12 warps start with 168, of which 8 then compute with 240 and the others keep 24.
REGISTERS, CONSUMER_REGISTERS, FETCH_REGISTERS = 168, 240, 24


@gluon.jit
def _fetch_tiles(
    q_rows, k_blocks, v_blocks, shared_key, num_shared, num_tiles, num_work, tiles, barriers,
    HEADS: gl.constexpr, GROUP: gl.constexpr, MAX_SHARED: gl.constexpr,
):  # fmt: skip
    """One warp. Fetches for the consumers, in the order in which they compute."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    BUFFERS: gl.constexpr = q_full.shape[0]
    CONSUMERS: gl.constexpr = q_tiles.shape[0] // BUFFERS
    ROWS: gl.constexpr = q_tiles.shape[1]
    QUERIES: gl.constexpr = ROWS // GROUP  # of a consumer
    PART: gl.constexpr = q_rows.block_shape[1]
    PARTS: gl.constexpr = DIM // PART
    GROUPS: gl.constexpr = HEADS // GROUP
    # The memory of q_tiles again, cut into what one query's heads take of one part.
    slabs = q_tiles._reinterpret(
        q_tiles.dtype, [BUFFERS * CONSUMERS * PARTS * QUERIES, GROUP, PART], q_rows.layout
    )
    found = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        done = work // gl.num_programs(0)
        tile = work % num_tiles
        group = work // num_tiles
        tile_group = tile * GROUPS + group
        count = gl.load(num_shared + tile_group)
        buffer = done % BUFFERS
        mbarrier.wait(q_empty.index(buffer), (done // BUFFERS + 1) & 1)
        mbarrier.expect(q_full.index(buffer), CONSUMERS * ROWS * DIM * 2)
        for consumer in gl.static_range(CONSUMERS):
            for part in gl.static_range(PARTS):
                for place in gl.static_range(QUERIES):
                    query = (tile * CONSUMERS + consumer) * QUERIES + place
                    slab = ((buffer * CONSUMERS + consumer) * PARTS + part) * QUERIES + place
                    tma.async_copy_global_to_shared(
                        q_rows, [query * HEADS + group * GROUP, part * PART], q_full.index(buffer),
                        slabs.index(slab),
                    )  # fmt: skip
        # Who shares nothing gets a block that nobody chose.
        for number in range(0, gl.maximum(count, 1)):
            first_key = gl.load(shared_key + tile_group * MAX_SHARED + number, mask=number < count, other=0)
            stage = found % STAGES
            phase = (found // STAGES + 1) & 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BLOCK * DIM * 2)
            tma.async_copy_global_to_shared(
                k_blocks, [first_key, group * DIM], k_full.index(stage), k_tiles.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BLOCK * DIM * 2)
            tma.async_copy_global_to_shared(
                v_blocks, [first_key, group * DIM], v_full.index(stage), v_tiles.index(stage)
            )
            found += 1


@gluon.jit
def _weigh(scores, block, rows, top, total, scale_log2):
    """One step of the online softmax: the weights of a block's keys, by how much earlier ones fade, and the
    running maximum and sum.

    block: number of the first key, queries that chose the block (bits). rows: each row's query (bit) and its
    last visible key, then all queries, and the first of the last keys.
    """
    first_key, queries = block
    bit, last_key, everyone, least_last_key = rows
    BLOCK: gl.constexpr = scores.shape[1]
    if ((queries & everyone) != everyone) | (first_key + (BLOCK - 1) > least_last_key):
        keys = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores.type.layout))
        num_visible = gl.where(((queries >> bit) & 1) != 0, last_key - first_key + 1, 0)
        scores = gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(num_visible, 1), scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    safe_top = gl.where(new_top > float("-inf"), new_top, 0.0) * scale_log2
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(safe_top, 1))
    fade = gl.exp2(top * scale_log2 - safe_top)
    return weights, fade, new_top, total * fade + gl.sum(weights, 1)


@gluon.jit
def _attend_tiles(
    consumer: gl.constexpr, tensors, tiles, barriers, sizes, scale_log2, HEADS: gl.constexpr,
    GROUP: gl.constexpr, MAX_SHARED: gl.constexpr,
):  # fmt: skip
    """Four warps. One part of the rows of every tile that this program takes."""
    out_rows, lse, shared_key, shared_queries, num_shared, own_key = tensors
    num_queries, num_tiles, num_work = sizes
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK: gl.constexpr = k_tiles.shape[1]
    BUFFERS: gl.constexpr = q_full.shape[0]
    CONSUMERS: gl.constexpr = q_tiles.shape[0] // BUFFERS
    ROWS: gl.constexpr = q_tiles.shape[1]
    DIM: gl.constexpr = q_tiles.shape[2]
    PART: gl.constexpr = out_rows.block_shape[1]
    PARTS: gl.constexpr = DIM // PART
    QUERIES: gl.constexpr = ROWS // GROUP
    GROUPS: gl.constexpr = HEADS // GROUP
    EVERYONE: gl.constexpr = ((1 << QUERIES) - 1) << (consumer * QUERIES)
    dtype: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    slabs = q_tiles._reinterpret(dtype, [BUFFERS * CONSUMERS * PARTS * QUERIES, GROUP, PART], out_rows.layout)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    found = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        done = work // gl.num_programs(0)
        tile = work % num_tiles
        group = work // num_tiles
        tile_group = tile * GROUPS + group
        count = gl.load(num_shared + tile_group)
        first = tile_group * MAX_SHARED
        first_query = (tile * CONSUMERS + consumer) * QUERIES
        query = first_query + row // GROUP
        inside = query < num_queries
        last_key = gl.load(own_key + query, mask=inside, other=0)
        least_last_key = gl.load(own_key + gl.minimum(first_query, num_queries - 1))
        for place in gl.static_range(1, QUERIES):
            other = gl.load(own_key + gl.minimum(first_query + place, num_queries - 1))
            least_last_key = gl.minimum(least_last_key, other)
        rows = (consumer * QUERIES + row // GROUP, last_key, EVERYONE, least_last_key)
        first_key = gl.load(shared_key + first, mask=count > 0, other=0)
        queries = gl.load(shared_queries + first, mask=count > 0, other=0)
        buffer = done % BUFFERS
        stage = found % STAGES
        part_of_tile = q_tiles.index(buffer * CONSUMERS + consumer)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
        out = gl.zeros([ROWS, DIM], gl.float32, layout=OUT)
        mbarrier.wait(q_full.index(buffer), (done // BUFFERS) & 1)
        mbarrier.wait(k_full.index(stage), (found // STAGES) & 1)
        scores = warpgroup_mma(
            part_of_tile, k_tiles.index(stage).permute((1, 0)),
            gl.zeros([ROWS, BLOCK], gl.float32, layout=SCORES), use_acc=False, is_async=True,
        )  # fmt: skip
        if done > 0:
            # Meanwhile the outputs of the tile before have left its buffer.
            tma.store_wait(0)
            release(q_empty.index((done + 1) % BUFFERS))
        scores = warpgroup_mma_wait(0, deps=(scores,))
        release(k_empty.index(stage))
        weights, fade, top, total = _weigh(scores, (first_key, queries), rows, top, total, scale_log2)
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
        mbarrier.wait(v_full.index(stage), (found // STAGES) & 1)
        for number in range(1, count):
            first_key = gl.load(shared_key + first + number)
            queries = gl.load(shared_queries + first + number)
            found += 1
            next_stage = found % STAGES
            mbarrier.wait(k_full.index(next_stage), (found // STAGES) & 1)
            scores = warpgroup_mma(
                part_of_tile, k_tiles.index(next_stage).permute((1, 0)),
                gl.zeros([ROWS, BLOCK], gl.float32, layout=SCORES), use_acc=False, is_async=True,
            )  # fmt: skip
            out = warpgroup_mma(operand, v_tiles.index(stage), out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            release(k_empty.index(next_stage))
            weights, fade, top, total = _weigh(scores, (first_key, queries), rows, top, total, scale_log2)
            # Here, because the compiler moves the wait for the product up to the last branch before it: with
            # none behind the weights, nothing of them would run beside the product.
            mbarrier.wait(v_full.index(next_stage), (found // STAGES) & 1)
            out, operand, weights = warpgroup_mma_wait(0, deps=(out, operand, weights))
            release(v_empty.index(stage))
            out *= gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, OUT)), 1)
            operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            stage = next_stage
        out = warpgroup_mma(operand, v_tiles.index(stage), out, is_async=True)
        sees_any = total > 0
        safe_total = gl.where(sees_any, total, 1.0)
        source = query * HEADS + group * GROUP + row % GROUP
        gl.store(lse + source, (top * scale_log2 + gl.log2(safe_total)) * 0.6931471805599453, mask=inside)
        factor = gl.where(sees_any, 1.0 / safe_total, 0.0)
        out, operand = warpgroup_mma_wait(0, deps=(out, operand))
        out *= gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, OUT)), 1)
        # The outputs take the place of the queries.
        part_of_tile.store(out.to(dtype))
        fence_async_shared()
        release(v_empty.index(stage))
        for place in gl.static_range(QUERIES):
            if first_query + place < num_queries:
                out_row = (first_query + place) * HEADS + group * GROUP
                for part in gl.static_range(PARTS):
                    slab = slabs.index(((buffer * CONSUMERS + consumer) * PARTS + part) * QUERIES + place)
                    tma.async_copy_shared_to_global(out_rows, [out_row, part * PART], slab)
        found += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_tiles", "num_work"])
def _attend_shared_hopper_kernel(
    q_rows, k_blocks, v_blocks, out_rows, lse, shared_key, shared_queries, num_shared, own_key,
    num_queries, num_tiles, num_work, scale_log2,
    HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr,
    MAX_SHARED: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, BUFFERS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as multiprocessors: out and lse (0 and -inf for queries that share nothing)."""
    dtype: gl.constexpr = k_blocks.dtype
    layout: gl.constexpr = k_blocks.layout
    q_tiles = gl.allocate_shared_memory(dtype, [BUFFERS * CONSUMERS, ROWS, DIM], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, DIM], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    tensors = (out_rows, lse, shared_key, shared_queries, num_shared, own_key)
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (num_queries, num_tiles, num_work)
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize(
        [
            (_attend_tiles, (0, tensors, tiles, barriers, sizes, scale_log2, HEADS, GROUP, MAX_SHARED)),
            (_attend_tiles, (1, tensors, tiles, barriers, sizes, scale_log2, HEADS, GROUP, MAX_SHARED)),
            (
                _fetch_tiles,
                (
                    q_rows, k_blocks, v_blocks, shared_key, num_shared, num_tiles, num_work, tiles, barriers,
                    HEADS, GROUP, MAX_SHARED,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, out: Tensor, lse: Tensor, *, softmax_scale: float
) -> None:
    """See ``triton_shared.attend_shared``."""
    num_tiles, groups, max_shared = schedule.shared_key.shape
    queries, heads, dim = q.shape
    group, block_size = heads // groups, schedule.block_size
    num_programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _attend_shared_hopper_kernel[(num_programs,)](
        boxes_of(q, queries * heads, dim, [group, PART]),
        boxes_of(k, k.shape[0], groups * dim, [block_size, dim]),
        boxes_of(v, k.shape[0], groups * dim, [block_size, dim]),
        boxes_of(out, queries * heads, dim, [group, PART]),
        lse, schedule.shared_key, schedule.shared_queries, schedule.num_shared, schedule.own_key,
        queries, num_tiles, num_tiles * groups, softmax_scale * LOG2E,
        HEADS=heads, GROUP=group, DIM=dim, BLOCK=block_size, MAX_SHARED=max_shared,
        ROWS=ROWS, CONSUMERS=CONSUMERS, BUFFERS=BUFFERS, STAGES=STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, FETCH_REGISTERS=FETCH_REGISTERS,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
