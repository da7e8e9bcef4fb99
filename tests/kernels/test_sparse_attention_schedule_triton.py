"""Triton kernels of sparse_attention: the schedule is complete, and made without waiting or compiling again.

Where they run: see `triton_interpreter`.
"""

import math

import pytest
import torch
from attention_checks import DTYPES, make_inputs, on_device, random_block_ids
from kernel_oracles import packed_layout
from msa_kernels import sparse_attention
from triton_interpreter import DEVICE, HAS_GPU, INTERPRETED, needs_triton, slow_in_interpreter

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

if INTERPRETED or HAS_GPU:
    import triton
    import triton.language as tl
    from msa_kernels.sparse_attention.triton_tiles import bounds_of_rest, find_item

    @triton.jit
    def _items_kernel(
        found, edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, per_item
    ):
        """One program per item: found [2, items, 4] = begin, end of the rest, first key, group."""
        item, items = tl.program_id(0), tl.num_programs(0)
        begin, end, _, _, key, _, group, _ = find_item(
            edges, last_extra, extra_bucket, first_keys, keys_in_block, num_blocks, num_buckets, per_item
        )
        row = found + 4 * item
        tl.store(row, begin)
        tl.store(row + 1, end)
        tl.store(row + 2, key)
        tl.store(row + 3, group)
        begin, end, key, group = bounds_of_rest(
            item, edges, last_extra, extra_bucket, first_keys, num_blocks, num_buckets, per_item
        )
        row += 4 * items
        tl.store(row, begin)
        tl.store(row + 1, end)
        tl.store(row + 2, key)
        tl.store(row + 3, group)


def neighbours_block_ids(layout, groups, block_size, slots, *, change, seed=0):
    """Every query takes over the blocks of the one before, except that a slot draws again with ``change``."""
    generator = torch.Generator().manual_seed(seed)
    rows, before = [], [[] for _ in range(groups)]
    for local in (layout.query_position // block_size).tolist():
        for group in range(groups):
            kept = [
                block
                for block in before[group]
                if block < local and torch.rand((), generator=generator) > change
            ]
            fresh = [
                block for block in torch.randperm(local, generator=generator).tolist() if block not in kept
            ]
            before[group] = [*kept, *fresh][: slots - 1]
            entries = [*before[group], local]
            rows.append(entries + [-1] * (slots - len(entries)))
    return torch.tensor(rows, dtype=torch.int32).view(-1, groups, slots).to(DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("group", "slots", "change"),
    [
        (1, 3, 0.3),
        (3, 5, 0.0),
        (16, 4, 0.3),
        pytest.param(2, 2, 0.5, marks=slow_in_interpreter),
        pytest.param(8, 3, 0.9, marks=slow_in_interpreter),
        pytest.param(12, 4, 0.5, marks=slow_in_interpreter),
    ],
    ids=str,
)
def test_the_schedule_holds_every_entry_once_and_lists_the_shared_blocks(group, slots, change):
    from msa_kernels.sparse_attention.triton_schedule import KeyBlockTable, Schedule

    groups, block_size, per_item = 2, 64, 16
    layout = packed_layout([70, 0, 1, 400, 33])
    order = torch.randperm(layout.num_queries, generator=torch.Generator().manual_seed(3))
    # Neighbours in the first half, tiles that mix documents and far positions in the second.
    layout = layout.select_queries(torch.cat([torch.arange(60, 130), order[:50]]))
    ids = neighbours_block_ids(layout, groups, block_size, slots, change=change)
    ids[5] = -1
    layout = on_device(layout)
    blocks = KeyBlockTable.build(layout, 504, block_size)
    schedule = Schedule.build(
        ids, layout, blocks, group=group, block_size=block_size, entries_per_item=per_item
    )

    starts, counts, first_block = [], [], []
    for begin, length in ((0, 70), (70, 0), (70, 1), (71, 400), (471, 33)):
        first_block.append(len(starts))
        starts += range(begin, begin + length, block_size)
        counts += [min(block_size, length - place) for place in range(0, length, block_size)]
    padding = 504 // block_size + 5 - len(starts)
    assert blocks.first_key.tolist() == starts + [504] * padding
    assert blocks.num_keys.tolist() == counts + [0] * padding
    assert blocks.first_block.tolist() == first_block

    tile = next(size for size in (32, 16, 8) if size * group <= 128)
    assert schedule.tile_queries == tile
    documents, positions = layout.query_document.tolist(), layout.query_position.tolist()
    num_blocks = blocks.first_key.numel()
    by_kind = {key: [] for key in range(3 * groups * num_blocks)}
    for start in range(0, len(documents), tile):
        rows = range(start, min(start + tile, len(documents)))
        for r in range(groups):
            chosen = {i: [first_block[documents[i]] + b for b in ids[i, r].tolist() if b >= 0] for i in rows}
            own = {i: first_block[documents[i]] + positions[i] // block_size for i in rows}
            lists = []
            for i in rows:
                for slot, block in enumerate(chosen[i]):
                    members = [j for j in rows if block in chosen[j]]
                    shared = len(members) >= tile / 2 or any(own[j] == block for j in members)
                    kind = 0 if not shared else 2 if own[i] == block else 1
                    assert schedule.kind[i, r, slot] == kind
                    by_kind[3 * (r * num_blocks + block) + kind].append((i * groups + r) * slots + slot)
                    if shared and members[0] == i:
                        lists.append((starts[block], sum(1 << (j - start) for j in members)))
                assert (schedule.kind[i, r, len(chosen[i]) :] == 3).all()
            count = int(schedule.num_shared[start // tile, r])
            found = (
                schedule.shared_key[start // tile, r, :count],
                schedule.shared_queries[start // tile, r, :count],
            )
            assert list(zip(found[0].tolist(), (found[1].long() % 2**32).tolist(), strict=True)) == lists
    sorted_entries = [entry for key in sorted(by_kind) for entry in by_kind[key]]
    assert schedule.entries[: len(sorted_entries)].tolist() == sorted_entries
    edges = torch.tensor([len(by_kind[key]) for key in sorted(by_kind)]).cumsum(0).tolist()
    assert schedule.edges.tolist() == [0, *edges]
    sizes = [
        sum(len(by_kind[3 * bucket + kind]) for kind in range(3)) for bucket in range(groups * num_blocks)
    ]
    extras = [max(0, math.ceil(size / per_item) - 1) for size in sizes]
    assert schedule.last_extra.tolist() == torch.tensor(extras).cumsum(0).tolist()
    extra_bucket = [bucket for bucket, count in enumerate(extras) for _ in range(count)]
    assert schedule.max_extra_items == ids.numel() // per_item
    padding = schedule.max_extra_items - len(extra_bucket)
    assert schedule.extra_bucket.tolist() == extra_bucket + [-1] * padding
    own_key = [int(layout.document_offsets[d]) + p for d, p in zip(documents, positions, strict=True)]
    assert schedule.own_key.tolist() == own_key

    # The kernels read items in two ways: by program with all kinds, by number with the rest alone.
    items = []
    for bucket in range(groups * num_blocks):
        first, end = edges[3 * bucket - 1] if bucket else 0, edges[3 * bucket]
        last = edges[3 * bucket + 2]
        for begin in range(first, max(last, first + 1), per_item):
            rest_end = min(begin + per_item, end)
            if begin < rest_end:
                key = (starts + [504] * padding)[bucket % num_blocks]
                items.append((begin, rest_end, key, bucket // num_blocks))
    found = torch.full((2, schedule.max_items, 4), -1, dtype=torch.int32, device=DEVICE)
    _items_kernel[(schedule.max_items,)](found, *schedule.arguments[:-2])
    for way in found.tolist():
        assert sorted(tuple(row) for row in way if row[0] < row[1]) == items


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize(("group", "block_size"), [(4, 64), (16, 128)])  # 16 takes the kernels for Hopper
def test_nothing_waits_for_the_gpu_and_no_new_selection_or_length_compiles_anything(group, block_size):
    from msa_kernels.sparse_attention import (
        hopper_backward,
        hopper_rest,
        hopper_shared,
        triton_backward,
        triton_forward,
        triton_kl,
        triton_schedule,
        triton_shared,
        triton_sums,
    )

    modules = (
        *(hopper_backward, hopper_rest, hopper_shared, triton_backward, triton_forward),
        *(triton_kl, triton_schedule, triton_shared, triton_sums),
    )
    kernels = {
        value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")
    }

    def run(length, seed):
        layout = on_device(packed_layout([length, 77]))
        options = {"dim": 128, "index_dim": 64, "dtype": DTYPES[0]}
        inputs = make_inputs(layout, length + 77, groups=2, group=group, **options)
        block_ids = random_block_ids(layout, 2, block_size, 4, seed=seed)
        leaves = inputs.clones()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sparse_attention(
                *leaves[:3],
                block_ids,
                layout,
                block_size=block_size,
                index_q=leaves.index_q,
                index_k=leaves.index_k,
                backend="triton",
            )
            torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {kernel: [len(cache[0]) for cache in kernel.device_caches.values()] for kernel in kernels}

    assert run(500, seed=0) == run(777, seed=1)


@needs_triton
def test_calls_without_gradients_have_longer_chunks(monkeypatch):
    from msa_kernels.sparse_attention import triton_forward, triton_op

    layout = on_device(packed_layout([256]))
    inputs = make_inputs(layout, 256, groups=1, group=1, dim=64, index_dim=64, dtype=DTYPES[0])
    block_ids = random_block_ids(layout, 1, 64, 1)
    lengths = []
    attend = triton_forward.attend

    def counted(q, *arguments, **options):
        lengths.append(len(q))
        attend(q, *arguments, **options)

    monkeypatch.setattr(triton_forward, "attend", counted)
    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", 192 * 64 * 2)
    q, k, v = inputs.clones()[:3]
    found = sparse_attention(q, k, v, block_ids, layout, block_size=64, backend="triton")
    assert lengths == [128, 128]
    with torch.no_grad():
        without = sparse_attention(q, k, v, block_ids, layout, block_size=64, backend="triton")
    assert lengths == [128, 128, 256]
    assert torch.equal(found.out, without.out)
