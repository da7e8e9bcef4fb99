"""Backward kernel of the attention, written for Hopper in Triton's Gluon.

It gives what ``triton_backward.differentiate`` gives, to the bit. There, eight warps wait together for every
product, for the softmax and for memory. Here, a program keeps a block of keys and

- a warp fetches the queries and output gradients of the next tiles of 64 rows (TMA), with lse and delta;
- two consumers of four warps take 64 keys each. Scores are [keys, rows]: probabilities and their gradients go
  from registers into the products that sum over the queries, and through shared memory into dQ, of which each
  consumer computes one half of the dims. The scores of the next tile are computed while dQ is stored.

The sums take half of the registers. What lives across a product is chosen so that little else is spilled.

Letters in shapes: Q queries of the chunk, K keys, Hq query heads, Hkv groups, G heads per group, d head dim,
B block size, E entries (see triton_schedule.py).
"""

from __future__ import annotations

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
from msa_kernels.sparse_attention.triton_tiles import LOG2E, find_item

# Rows of a tile, and tiles that are held.
ROWS, STAGES = 64, 2
# Registers a thread: 12 warps start with 168, of which 8 then compute with 240 and the others keep 24.
REGISTERS, CONSUMER_REGISTERS, FETCH_REGISTERS = 168, 240, 24


@gluon.jit
def _tile_of(number, begin, own_begin, end, POSITIONS: gl.constexpr):
    """First entry of a tile, where the entries of its kind end, and whether it needs a causal mask.

    No tile has entries of both sides of ``own_begin``.
    """
    before = gl.cdiv(own_begin - begin, POSITIONS)
    is_own = number >= before
    start = gl.where(is_own, own_begin + (number - before) * POSITIONS, begin + number * POSITIONS)
    return start, gl.where(is_own, end, own_begin), is_own


@gluon.jit
def _fetch(
    tensors, rows_of, item, tiles, barriers, num_tiles, HEADS: gl.constexpr, GROUP: gl.constexpr,
    ENTRIES_PER_QUERY: gl.constexpr,
):  # fmt: skip
    """One warp."""
    entries, own_key, lse, delta = tensors
    q_rows, dout_rows, k_blocks, v_blocks = rows_of
    begin, own_begin, end, first_key, group = item
    k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, last_key_tiles = tiles
    held, full, empty = barriers
    HALF: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    STAGES: gl.constexpr = q_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[1]
    POSITIONS: gl.constexpr = ROWS // GROUP
    PART: gl.constexpr = q_rows.block_shape[1]
    PARTS: gl.constexpr = DIM // PART
    q_slabs = q_tiles._reinterpret(q_tiles.dtype, [STAGES * PARTS * POSITIONS, GROUP, PART], q_rows.layout)
    dout_slabs = dout_tiles._reinterpret(
        q_tiles.dtype, [STAGES * PARTS * POSITIONS, GROUP, PART], q_rows.layout
    )
    if num_tiles > 0:
        mbarrier.expect(held, 4 * HALF * DIM * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                k_blocks, [first_key + half * HALF, group * DIM], held, k_tiles.index(half)
            )
            tma.async_copy_global_to_shared(
                v_blocks, [first_key + half * HALF, group * DIM], held, v_tiles.index(half)
            )
    row = gl.arange(0, ROWS, layout=gl.BlockedLayout([2], [32], [1], [0]))
    for number in range(0, num_tiles):
        start, tile_end, _ = _tile_of(number, begin, own_begin, end, POSITIONS)
        place = start + row // GROUP
        # Places behind the end repeat the last one, with probabilities of 0.
        query = gl.load(entries + gl.minimum(place, tile_end - 1)) // ENTRIES_PER_QUERY
        source = query * HEADS + group * GROUP + row % GROUP
        lse_log2 = gl.where(place < tile_end, gl.load(lse + source) * 1.4426950408889634, float("inf"))
        row_delta = gl.load(delta + source)
        last_key = gl.load(own_key + query) - first_key
        stage = number % STAGES
        mbarrier.wait(empty.index(stage), (number // STAGES + 1) & 1)
        lse_tiles.index(stage).store(lse_log2)
        delta_tiles.index(stage).store(row_delta)
        last_key_tiles.index(stage).store(last_key)
        gl.thread_barrier()
        mbarrier.expect(full.index(stage), 2 * ROWS * DIM * 2)
        for position in gl.static_range(POSITIONS):
            entry = gl.load(entries + gl.minimum(start + position, tile_end - 1))
            first_row = entry // ENTRIES_PER_QUERY * HEADS + group * GROUP
            for part in gl.static_range(PARTS):
                slab = (stage * PARTS + part) * POSITIONS + position
                tma.async_copy_global_to_shared(
                    q_rows, [first_row, part * PART], full.index(stage), q_slabs.index(slab)
                )
                tma.async_copy_global_to_shared(
                    dout_rows, [first_row, part * PART], full.index(stage), dout_slabs.index(slab)
                )


@gluon.jit
def _hand_in(gradient, partial, tile, half: gl.constexpr, where, GROUPS: gl.constexpr):
    """As ``triton_tiles.hand_in_key_gradient``, of one half of the block's keys."""
    row, first_key, num_keys, group, is_first_chunk = where
    HALF: gl.constexpr = tile.shape[0]
    DIM: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = tile.type.layout
    place = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT)), 0)
    if row < 0:
        key = (first_key + place).to(gl.int64) * GROUPS + group
        pointers = gradient + gl.expand_dims(key * DIM, 1) + dims
        in_block = gl.expand_dims(place < num_keys, 1)
        before = gl.load(pointers, mask=in_block & (is_first_chunk == 0), other=0.0).to(gl.float32)
        gl.store(pointers, (before + tile).to(gradient.dtype.element_ty), mask=in_block)
    else:
        target = row.to(gl.int64) * (2 * HALF) + place
        gl.store(partial + gl.expand_dims(target * DIM, 1) + dims, tile)


@gluon.jit
def _differentiate(
    half: gl.constexpr, tensors, item, tiles, barriers, num_tiles, out, scale, scale_log2,
    HEADS: gl.constexpr, GROUP: gl.constexpr, WITH_TEACHER: gl.constexpr,
):  # fmt: skip
    """Four warps. One half of the keys, then of the dims of dQ."""
    entries, teacher, dq_rows = tensors
    begin, own_begin, end, first_key, group = item
    (
        k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, last_key_tiles, ds_tiles, dq_tiles
    ) = tiles  # fmt: skip
    held, full, empty, exchanged = barriers
    dk, partial_dk, dv, partial_dv, row, num_keys, is_first_chunk, writes = out
    HALF: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    STAGES: gl.constexpr = q_tiles.shape[0]
    ROWS: gl.constexpr = q_tiles.shape[1]
    POSITIONS: gl.constexpr = ROWS // GROUP
    PART: gl.constexpr = dq_rows.block_shape[1]
    dtype: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    QUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    OF_ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    # The memory of k_tiles again: dims half * 64 .. of the keys of each half.
    k_slabs = k_tiles._reinterpret(dtype, [2 * DIM // PART, HALF, PART], dq_rows.layout)
    dq_tile = dq_tiles.index(half)
    dq_slabs = dq_tiles._reinterpret(dtype, [2 * POSITIONS, GROUP, PART], dq_rows.layout)
    keys = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    sum_dk = gl.zeros([HALF, DIM], gl.float32, layout=SUM)
    sum_dv = gl.zeros([HALF, DIM], gl.float32, layout=SUM)
    zeros = gl.zeros([HALF, ROWS], gl.float32, layout=SCORES)
    if num_tiles > 0:
        mbarrier.wait(held, 0)
        mbarrier.wait(full.index(0), 0)
    scores = warpgroup_mma(
        k_tiles.index(half), q_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    for number in range(0, num_tiles):
        start, tile_end, is_own = _tile_of(number, begin, own_begin, end, POSITIONS)
        stage = number % STAGES
        next_stage = (number + 1) % STAGES
        q_tile = q_tiles.index(stage)
        dout_tile = dout_tiles.index(stage)
        dp = warpgroup_mma(
            v_tiles.index(half), dout_tile.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        lse_log2 = lse_tiles.index(stage).load(OF_ROW)
        log_p = scores * scale_log2 - gl.expand_dims(lse_log2, 0)
        if is_own:
            last_key = last_key_tiles.index(stage).load(OF_ROW)
            log_p = gl.where(gl.expand_dims(keys, 1) <= gl.expand_dims(last_key, 0), log_p, float("-inf"))
        p = gl.exp2(log_p)
        p_operand = gl.convert_layout(p.to(dtype), OPERAND)
        sum_dv = warpgroup_mma(p_operand, dout_tile, sum_dv, is_async=True)
        row_delta = delta_tiles.index(stage).load(OF_ROW)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * (dp - gl.expand_dims(row_delta, 0))).to(dtype)
        ds_tiles.index(number % 2 * 2 + half).store(ds)
        ds_operand = gl.convert_layout(ds, OPERAND)
        sum_dk = warpgroup_mma(ds_operand, q_tile, sum_dk, is_async=True)
        if WITH_TEACHER:
            # Long over, but a branch: the compiler does not mix what follows into the product's instructions.
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
        fence_async_shared()
        release(exchanged)
        if WITH_TEACHER:
            mean = gl.sum(gl.reshape(p, [HALF, POSITIONS, GROUP]), 2) / GROUP
            MEAN: gl.constexpr = mean.type.layout
            place = gl.expand_dims(start + gl.arange(0, POSITIONS, layout=gl.SliceLayout(0, MEAN)), 0)
            key = gl.expand_dims(half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, MEAN)), 1)
            gl.store(teacher + (place.to(gl.int64) * (2 * HALF) + key), mean, mask=place < tile_end)
        mbarrier.wait(exchanged, number & 1)
        dq = gl.zeros([ROWS, PART], gl.float32, layout=QUERY)
        for other in gl.static_range(2):
            dq = warpgroup_mma(
                ds_tiles.index(number % 2 * 2 + other).permute((1, 0)), k_slabs.index(other * 2 + half), dq,
                use_acc=other > 0, is_async=True,
            )  # fmt: skip
        dq_row = ()
        for position in gl.static_range(POSITIONS):
            entry = gl.load(entries + gl.minimum(start + position, tile_end - 1))
            dq_row = dq_row + (entry * GROUP,)  # type: ignore[assignment]  # noqa: RUF005
        # dQ is still on its way, and needs neither queries nor output gradients.
        sum_dv, sum_dk, p_operand, ds_operand = warpgroup_mma_wait(
            2, deps=(sum_dv, sum_dk, p_operand, ds_operand)
        )
        release(empty.index(stage))
        # Behind the last tile, of what happens to be there, for nobody.
        mbarrier.wait(full.index(next_stage), ((number + 1) // STAGES) & 1, pred=number + 1 < num_tiles)
        scores = warpgroup_mma(
            k_tiles.index(half), q_tiles.index(next_stage).permute((1, 0)), zeros, use_acc=False,
            is_async=True,
        )  # fmt: skip
        # The part of the tile before has left its buffer.
        tma.store_wait(0)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        gl.thread_barrier()
        # Scaled before it is rounded: without, fp16 overflows ten times as early as the gradient itself.
        dq_tile.store((dq * scale).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        for position in gl.static_range(POSITIONS):
            if start + position < tile_end:
                tma.async_copy_shared_to_global(
                    dq_rows, [dq_row[position], half * PART], dq_slabs.index(half * POSITIONS + position)
                )
        scores = warpgroup_mma_wait(0, deps=(scores,))
    if writes:
        where = (row, first_key, num_keys, group, is_first_chunk)
        _hand_in(dk, partial_dk, sum_dk * scale, half, where, HEADS // GROUP)
        _hand_in(dv, partial_dv, sum_dv, half, where, HEADS // GROUP)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_blocks", "num_buckets", "entries_per_item", "is_first_chunk"])
def _backward_hopper_kernel(
    q_rows, k_blocks, v_blocks, dout_rows, lse, delta, edges, last_extra, extra_bucket, first_keys,
    keys_in_block, num_blocks, num_buckets, entries_per_item, entries, own_key, dq_rows, dk, partial_dk, dv,
    partial_dv, teacher, is_first_chunk, scale, scale_log2,
    HEADS: gl.constexpr, GROUP: gl.constexpr, ENTRIES_PER_QUERY: gl.constexpr, DIM: gl.constexpr,
    BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, WITH_TEACHER: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per item; see ``triton_backward._backward_kernel``."""
    begin, _, own_begin, end, first_key, num_keys, group, row = find_item(
        edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, entries_per_item
    )
    writes = (begin < end) | ((row < 0) & (is_first_chunk != 0))
    POSITIONS: gl.constexpr = ROWS // GROUP
    HALF: gl.constexpr = BLOCK // 2
    num_tiles = gl.cdiv(own_begin - begin, POSITIONS) + gl.cdiv(end - own_begin, POSITIONS)
    dtype: gl.constexpr = k_blocks.dtype
    layout: gl.constexpr = k_blocks.layout
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tiles = gl.allocate_shared_memory(dtype, [2, HALF, DIM], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, HALF, DIM], layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], layout)
    dout_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [4, HALF, ROWS], layout)
    dq_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, DIM // 2], layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], vector)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], vector)
    last_key_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], vector)
    held = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    exchanged = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(held, count=1)
    mbarrier.init(exchanged, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()
    item = (begin, own_begin, end, first_key, group)
    fetched = (k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, last_key_tiles)
    tiles = (
        k_tiles, v_tiles, q_tiles, dout_tiles, lse_tiles, delta_tiles, last_key_tiles, ds_tiles, dq_tiles
    )  # fmt: skip
    barriers = (held, full, empty, exchanged)
    out = (dk, partial_dk, dv, partial_dv, row, num_keys, is_first_chunk, writes)
    gl.warp_specialize(
        [
            (
                _differentiate,
                (
                    0, (entries, teacher, dq_rows), item, tiles, barriers, num_tiles, out, scale, scale_log2,
                    HEADS, GROUP, WITH_TEACHER,
                ),
            ),
            (
                _differentiate,
                (
                    1, (entries, teacher, dq_rows), item, tiles, barriers, num_tiles, out, scale, scale_log2,
                    HEADS, GROUP, WITH_TEACHER,
                ),
            ),
            (
                _fetch,
                (
                    (entries, own_key, lse, delta), (q_rows, dout_rows, k_blocks, v_blocks), item, fetched,
                    (held, full, empty), num_tiles, HEADS, GROUP, ENTRIES_PER_QUERY,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    schedule: Schedule,
    partial_dq: Tensor,
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    is_first_chunk: bool,
    softmax_scale: float,
    teacher: Tensor | None,
) -> None:
    """See ``triton_backward.differentiate``."""
    _, groups, slots = schedule.kind.shape
    queries, heads, dim = q.shape
    group, block_size = heads // groups, schedule.block_size
    half = block_size // 2
    _backward_hopper_kernel[(schedule.max_items,)](
        boxes_of(q, queries * heads, dim, [group, PART]),
        boxes_of(k, k.shape[0], groups * dim, [half, dim]),
        boxes_of(v, k.shape[0], groups * dim, [half, dim]),
        boxes_of(dout, queries * heads, dim, [group, PART]),
        lse, delta, *schedule.arguments,
        boxes_of(partial_dq, partial_dq.shape[0] * group, dim, [group, PART]),
        *sums, lse if teacher is None else teacher,
        int(is_first_chunk), softmax_scale, softmax_scale * LOG2E,
        HEADS=heads, GROUP=group, ENTRIES_PER_QUERY=groups * slots, DIM=dim, BLOCK=block_size,
        ROWS=ROWS, STAGES=STAGES, WITH_TEACHER=teacher is not None,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, FETCH_REGISTERS=FETCH_REGISTERS,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
