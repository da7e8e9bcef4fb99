"""The Triton kernels of sparse_attention against the reference.

Where they run: see `triton_interpreter`. The interpreter multiplies bf16 matrices wrongly; it gets fp16.
"""

import functools
import math

import pytest
import torch
from kernel_oracles import Inputs, packed_layout, random_inputs
from msa_kernels import DocumentLayout, sparse_attention
from torch.utils.checkpoint import checkpoint
from triton_interpreter import DEVICE, needs_triton, slow_in_interpreter

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
NAMES = ("out", "lse", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    """Fills what torch.empty returns, so that an element that a kernel leaves unwritten shows."""

    def poisoning(make):
        def make_poisoned(*args, **options):
            tensor = make(*args, **options)
            tensor.detach().fill_(math.nan if tensor.is_floating_point() else 99)
            return tensor

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


def make_inputs(layout, num_keys, *, groups, group, dim, index_dim, dtype, seed=0):
    """Random inputs; the queries are those of the layout, not necessarily one per key."""
    inputs = random_inputs(
        max(num_keys, layout.num_queries), heads=groups * group, groups=groups, dim=dim, value_dim=dim,
        index_dim=index_dim, dtype=dtype, seed=seed,
    )  # fmt: skip
    queries, keys = layout.num_queries, num_keys
    counts = (queries, keys, keys, queries, keys)
    return Inputs(*(tensor[:count].to(DEVICE) for tensor, count in zip(inputs, counts, strict=True)))


def on_device(layout):
    return DocumentLayout(
        document_offsets=layout.document_offsets.to(DEVICE),
        query_document=layout.query_document.to(DEVICE),
        query_position=layout.query_position.to(DEVICE),
        max_document_length=layout.max_document_length,
    )


def random_block_ids(layout, groups, block_size, slots, *, seed=0, favourite=None):
    """Distinct visible blocks in any order, the local one among them, -1 behind, and some rows of -1 only.

    With ``favourite``, every query that can see that block has it.
    """
    generator = torch.Generator().manual_seed(seed)
    local = (layout.query_position // block_size).tolist()
    rows = []
    for block in local:
        for _ in range(groups):
            chosen = torch.randperm(block, generator=generator).tolist()[: slots - 1]
            if favourite is not None and favourite < block and favourite not in chosen:
                chosen[:1] = [favourite]
            entries = [block, *chosen][:slots]
            if torch.rand((), generator=generator) < 0.05:
                entries = []
            order = torch.randperm(len(entries), generator=generator).tolist()
            rows.append([entries[i] for i in order] + [-1] * (slots - len(entries)))
    return torch.tensor(rows, dtype=torch.int32).view(len(local), groups, slots).to(DEVICE)


def straightforward(inputs, block_ids, layout, block_size, kl_teacher, dtype):
    """out, lse and kl from one masked matrix of scores, every step in ``dtype``."""
    q, k, v, index_q, index_k = inputs
    groups = k.shape[1]
    key_document = torch.searchsorted(
        layout.document_offsets[1:], torch.arange(k.shape[0], device=DEVICE), right=True
    )
    key_position = torch.arange(k.shape[0], device=DEVICE) - layout.document_offsets[key_document]
    sees = (layout.query_document[:, None] == key_document) & (key_position <= layout.query_position[:, None])
    chosen = (block_ids[..., None] == key_position // block_size).any(2)  # [Q, groups, K]
    visible = (chosen & sees[:, None]).transpose(0, 1)  # [groups, Q, K]
    some = visible.any(-1, keepdim=True)
    hidden = ~visible
    scores = torch.einsum("qrgd,krd->rgqk", q.unflatten(1, (groups, -1)), k) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(hidden[:, None], torch.finfo(dtype).min)
    p = scores.softmax(-1)
    out = torch.einsum("rgqk,krd->qrgd", p, v).flatten(1, 2)
    out = out.masked_fill(~some.transpose(0, 1).repeat_interleave(q.shape[1] // groups, 1), 0)
    lse = scores.logsumexp(-1).masked_fill(~some[:, None, :, 0], -math.inf).permute(2, 0, 1).flatten(1)
    if index_q is None:
        return out, lse, None
    z = torch.einsum("qrd,kd->rqk", index_q, index_k) / math.sqrt(index_q.shape[2])
    log_student = z.masked_fill(hidden, torch.finfo(dtype).min).log_softmax(-1)
    teacher = p.detach()
    if kl_teacher == "group_mean":
        teacher = teacher.mean(1, keepdim=True)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_student[:, None]).sum(-1).mean(1)
    return out, lse.detach(), kl.masked_fill(~some[..., 0], 0).t()


def outputs_and_gradients(attend, inputs, weights, kl_weights):
    """out, lse, kl and the five gradients; those of the index branch for upstream gradients of order one."""
    leaves = Inputs(*(tensor.detach().clone().requires_grad_() for tensor in inputs))
    out, lse, kl = attend(leaves)
    gradients = torch.autograd.grad([out, kl], leaves, [weights.to(out.dtype), kl_weights.to(kl.dtype)])
    return [tensor.detach().double() for tensor in (out, lse, kl, *gradients)]


def assert_error_at_most_twice(found, plain, exact, unit):
    """Per row (outputs, gradients of queries) or block of rows (gradients of keys).

    The same-dtype code's error in a single row may happen to be small: its typical error, absolute or
    relative to the row, is allowed as well.
    """
    for name, ours, same_dtype, right in zip(NAMES, found, plain, exact, strict=True):
        rows = unit if name in ("dk", "dv", "dindex_k") else 1

        def size(tensor, rows=rows):
            per_row = tensor.flatten(1).square().sum(1)
            return torch.stack([part.sum().sqrt() for part in per_row.split(rows)])

        def error(tensor, right=right):
            return size(torch.where(right == tensor, 0.0, tensor - right))  # equal infinities differ by 0

        assert not ours.isnan().any(), name
        typical, length = error(same_dtype), size(right.nan_to_num(neginf=0.0))
        relative = (typical / length.clamp(min=1e-30))[length > 0].median()
        allowed = 2 * torch.stack([typical, typical.median().expand_as(typical), relative * length]).amax(0)
        bad = (error(ours) > allowed).nonzero().flatten().tolist()
        assert not bad, (name, bad[:8], error(ours)[bad[:8]], allowed[bad[:8]])


def assert_close(found, plain, exact, unit):
    """Where probabilities are 0 and 1, exact gradients are 0 and a ratio of errors says nothing."""
    del plain, unit
    for name, ours, right in zip(NAMES, found, exact, strict=True):
        error = torch.where(right == ours, 0.0, ours - right)  # equal infinities differ by 0
        assert error.norm() <= 0.01 * right[right.isfinite()].norm() + 1e-4 * math.sqrt(right.numel()), name


def check(
    layout, num_keys, *, groups, group, dim, index_dim, block_size, slots, kl_teacher, dtype,
    change=lambda inputs: inputs, compare=assert_error_at_most_twice, **ids
):  # fmt: skip
    layout = on_device(layout)
    inputs = make_inputs(
        layout, num_keys, groups=groups, group=group, dim=dim, index_dim=index_dim, dtype=dtype
    )
    inputs = change(inputs)
    block_ids = random_block_ids(layout, groups, block_size, slots, **ids)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(inputs.q.shape, generator=generator).to(DEVICE, dtype)
    kl_weights = torch.randn(inputs.q.shape[0], groups, generator=generator).to(DEVICE)

    def plain(leaves, cast):
        leaves = Inputs(*(tensor.to(cast) for tensor in leaves))
        return straightforward(leaves, block_ids, layout, block_size, kl_teacher, cast)

    def triton(leaves):
        return sparse_attention(
            *leaves[:3], block_ids, layout, block_size=block_size, index_q=leaves.index_q,
            index_k=leaves.index_k, kl_teacher=kl_teacher, backend="triton",
        )  # fmt: skip

    exact_inputs = Inputs(*(tensor.double() for tensor in inputs))
    exact = outputs_and_gradients(lambda x: plain(x, torch.float64), exact_inputs, weights, kl_weights)
    same_dtype = outputs_and_gradients(lambda x: plain(x, dtype), inputs, weights, kl_weights)
    found = outputs_and_gradients(triton, inputs, weights, kl_weights)
    compare(found, same_dtype, exact, block_size)


SHAPES = [
    # lengths, groups, heads per group, dim, index dim, block size, slots, KL
    ([100, 1, 0, 75], 2, 4, 64, 64, 64, 2, "group_mean"),
    pytest.param(([100, 1, 0, 75], 2, 4, 64, 64, 64, 2, "per_head"), marks=slow_in_interpreter),
    ([1, 0, 140], 1, 16, 128, 64, 64, 2, "group_mean"),
    ([270], 1, 1, 64, 128, 128, 2, "per_head"),
    ([0, 130, 1], 1, 2, 64, 64, 128, 4, "group_mean"),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_as_exact_as_pytorch_in_the_same_dtype(shape, dtype):
    lengths, groups, group, dim, index_dim, block_size, slots, kl_teacher = shape
    check(
        packed_layout(lengths), sum(lengths), groups=groups, group=group, dim=dim, index_dim=index_dim,
        block_size=block_size, slots=slots, kl_teacher=kl_teacher, dtype=dtype,
    )  # fmt: skip


def longer(inputs, factor=8.0):
    """Scores in the hundreds, of both branches: exponentials overflow if no maximum is taken off."""
    return Inputs(*(t * factor if n != "v" else t for n, t in zip(inputs._fields, inputs, strict=True)))


def with_equal_keys(inputs):
    """All keys of the main and of the index branch are one."""
    return inputs._replace(
        k=inputs.k[:1].expand_as(inputs.k).contiguous(),
        index_k=inputs.index_k[:1].expand_as(inputs.index_k).contiguous(),
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [longer, with_equal_keys])
def test_extreme_and_repeated_values(change, dtype):
    check(
        packed_layout([100, 1, 0, 30]), 131, groups=1, group=2, dim=64, index_dim=64, block_size=64, slots=2,
        kl_teacher="group_mean", dtype=dtype, change=change, compare=assert_close,
    )  # fmt: skip


def gradients(inputs, layout, block_ids, weights=None, kl_weights=None):
    """Of the five inputs, with backend triton; upstream gradients of out and of kl."""
    leaves = Inputs(*(tensor.detach().clone().requires_grad_() for tensor in inputs))
    found = sparse_attention(
        *leaves[:3], block_ids, layout, block_size=64, index_q=leaves.index_q, index_k=leaves.index_k,
        index_softmax_scale=1.0, backend="triton",
    )  # fmt: skip
    if weights is not None:
        return torch.autograd.grad(found.out, leaves[:3], weights)
    return torch.autograd.grad(found.kl, leaves[3:], kl_weights.to(found.kl))


@needs_triton
def test_tiny_upstream_gradients_of_the_kl_keep_their_precision():
    layout = on_device(packed_layout([90]))
    inputs = make_inputs(layout, 90, groups=1, group=1, dim=64, index_dim=64, dtype=torch.float16)
    # Long index keys bring the gradient of the queries back into fp16's range, where it can be compared.
    inputs = inputs._replace(index_q=inputs.index_q * 2.0**-15, index_k=inputs.index_k * 2.0**12)
    block_ids = random_block_ids(layout, 1, 64, 2)

    def of_queries(factor):
        found, _ = gradients(inputs, layout, block_ids, kl_weights=torch.full((90, 1), factor))
        return found[64:].double() / factor

    expected = of_queries(1.0)
    assert expected.norm() > 0
    assert (of_queries(2.0**-24) - expected).norm() < 0.005 * expected.norm()


@needs_triton
def test_gradients_of_queries_that_fit_fp16_do_not_overflow_on_the_way():
    layout = on_device(packed_layout([90]))
    inputs = make_inputs(layout, 90, groups=1, group=1, dim=64, index_dim=64, dtype=torch.float16)
    inputs = inputs._replace(k=inputs.k * 4)
    block_ids = random_block_ids(layout, 1, 64, 2)
    weights = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to(inputs.q)
    small = gradients(inputs, layout, block_ids, weights)[0].double().abs().max()
    factor = 2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / 2 / small))
    assert gradients(inputs, layout, block_ids, weights * factor)[0].isfinite().all()


@needs_triton
def test_more_blocks_than_can_be_sorted_are_refused_before_any_work():
    from msa_kernels.sparse_attention.triton_op import refusal

    layout = DocumentLayout(
        document_offsets=torch.arange(600_001, dtype=torch.int32),
        query_document=torch.zeros(1, dtype=torch.int32),
        query_position=torch.zeros(1, dtype=torch.int32),
        max_document_length=1,
    )
    q, k = torch.zeros(1, 4, 64, dtype=torch.float16), torch.zeros(600_000, 1, 64, dtype=torch.float16)
    options = {
        "block_size": 64, "index_q": None, "index_k": None, "index_lse": None, "softmax_scale": 1.0,
        "index_softmax_scale": 1.0, "kl_teacher": "group_mean",
    }  # fmt: skip
    ids = torch.zeros(1, 1, 64, dtype=torch.int32)
    reason = refusal(q, k, k, ids, layout, **options)
    assert "there may be 609,375 blocks" in reason
    assert "at most 524,287 are supported" in reason
    assert refusal(q, k, k, ids[..., :16], layout, **options) is None


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_may_be_any_subset_of_the_keys_places_in_any_order(dtype):
    layout = packed_layout([70, 0, 110])
    chosen = torch.randperm(180, generator=torch.Generator().manual_seed(1))[:60]
    check(
        layout.select_queries(chosen), 180, groups=2, group=4, dim=64, index_dim=64, block_size=64, slots=2,
        kl_teacher="group_mean", dtype=dtype,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_many_queries_and_several_chunks_of_queries(dtype, monkeypatch):
    from msa_kernels.sparse_attention import triton_op

    monkeypatch.setattr(triton_op, "ROWS_PER_ITEM", 128)
    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", 1)
    check(
        packed_layout([150, 10]), 160, groups=1, group=4, dim=64, index_dim=64, block_size=64, slots=3,
        kl_teacher="group_mean", dtype=dtype, favourite=0,
    )  # fmt: skip


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
        (4, 5, 0.0),
        (16, 4, 0.3),
        pytest.param(2, 2, 0.5, marks=slow_in_interpreter),
        pytest.param(8, 3, 0.9, marks=slow_in_interpreter),
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

    tile = min(32, 128 // group)
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


def small_call():
    layout = on_device(packed_layout([80, 10]))
    inputs = make_inputs(layout, 90, groups=1, group=2, dim=64, index_dim=64, dtype=torch.float16)
    block_ids = random_block_ids(layout, 1, 64, 2)
    return layout, inputs, block_ids


def attend_small(leaves, block_ids, layout):
    return sparse_attention(
        *leaves[:3], block_ids, layout, block_size=64, index_q=leaves[3], index_k=leaves[4], backend="triton"
    )


@functools.cache
def small_results():
    """out, lse and kl of the small call, and the gradients of out.sum() + kl.sum() for all five inputs."""
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones()
    found = attend_small(leaves, block_ids, layout)
    gradients = torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
    return [tensor.detach() for tensor in (*found, *gradients)]


@needs_triton
def test_without_the_index_branch_there_is_no_kl_and_the_rest_is_the_same():
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones()
    found = sparse_attention(*leaves[:3], block_ids, layout, block_size=64, backend="triton")
    gradients = torch.autograd.grad(found.out.float().sum(), leaves[:3])
    assert found.kl is None
    out, lse, _, *with_index = small_results()
    expected = (out, lse, *with_index[:3])
    assert all(torch.equal(a, b) for a, b in zip((found.out, found.lse, *gradients), expected, strict=True))


@needs_triton
@pytest.mark.parametrize(
    "wanted",
    [(1, 2), (0, 4), *(pytest.param(one, marks=slow_in_interpreter) for one in [(0,), (3,), (4,)])],
    ids=str,
)
def test_only_the_inputs_that_want_a_gradient_get_one_and_it_is_the_same(wanted):
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones(requires_grad=False)
    for place in wanted:
        leaves[place].requires_grad_()
    found = attend_small(leaves, block_ids, layout)
    (found.out.float().sum() + found.kl.sum()).backward()
    every = small_results()[3:]
    for place in range(5):
        if place in wanted:
            torch.testing.assert_close(leaves[place].grad, every[place])
        else:
            assert leaves[place].grad is None


@needs_triton
def test_out_reaches_no_index_input_and_kl_reaches_nothing_else():
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones()
    found = attend_small(leaves, block_ids, layout)
    assert not found.lse.requires_grad
    of_out = torch.autograd.grad(found.out.sum(), leaves, retain_graph=True, allow_unused=True)
    of_kl = torch.autograd.grad(found.kl.sum(), leaves, allow_unused=True)
    assert [gradient is None for gradient in of_out] == [False] * 3 + [True] * 2
    assert [gradient is None for gradient in of_kl] == [True] * 3 + [False] * 2


@needs_triton
def test_a_second_run_with_activation_recomputation_agrees_in_every_bit():
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones()
    found = checkpoint(lambda *each: attend_small(each, block_ids, layout), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip((*found, *gradients), small_results(), strict=True))


@needs_triton
def test_no_queries_attend_to_nothing():
    layout, inputs, block_ids = small_call()
    leaves = Inputs(*(t[:0] if n in ("q", "index_q") else t for n, t in inputs._asdict().items())).clones()
    found = sparse_attention(
        *leaves[:3], block_ids[:0], layout.select_queries(slice(0, 0)), block_size=64,
        index_q=leaves.index_q, index_k=leaves.index_k, backend="triton",
    )  # fmt: skip
    assert found.out.shape == (0, 2, 64)
    assert found.kl.shape == (0, 1)
    gradients = torch.autograd.grad(found.out.sum() + found.kl.sum(), leaves)
    assert all((gradient == 0).all() for gradient in gradients)


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "the dtype is torch.float32"),
        ({"dim": 32}, "the head dim is 32"),
        ({"value_dim": 128}, "the head dim of v is 128"),
        ({"index_dim": 32}, "the index head dim is 32"),
        ({"block_size": 32}, "the block size is 32"),
        ({"heads": 3}, "there are 3 query heads per group"),
        ({"slots": 65}, "there are 65 blocks per query"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_run_is_refused_with_the_reason(change, reason):
    size = {"heads": 4, "groups": 1, "dim": 64, "value_dim": 64, "index_dim": 64, "dtype": torch.float16}
    inputs = random_inputs(5, **(size | {key: change[key] for key in change.keys() & size.keys()}))
    inputs = Inputs(*(tensor.to(DEVICE) for tensor in inputs))
    block_ids = torch.full((5, 1, change.get("slots", 2)), -1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"cannot run with backend='triton': {reason}"):
        sparse_attention(
            *inputs[:3], block_ids, on_device(packed_layout([5])), block_size=change.get("block_size", 64),
            index_q=inputs.index_q, index_k=inputs.index_k, backend="triton",
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl_teacher", ["group_mean", "per_head"])
@pytest.mark.parametrize(
    "shape",
    [
        ([700, 1, 0, 1300], 2, 16, 128, 128, 128, 4),
        ([1111], 4, 16, 128, 128, 128, 8),
        ([1000, 500], 2, 8, 64, 128, 128, 4),
        ([900], 4, 1, 128, 64, 64, 5),
    ],
    ids=str,
)
def test_larger_sizes_on_a_gpu(shape, kl_teacher, dtype):
    lengths, groups, group, dim, index_dim, block_size, slots = shape
    check(
        packed_layout(lengths), sum(lengths), groups=groups, group=group, dim=dim, index_dim=index_dim,
        block_size=block_size, slots=slots, kl_teacher=kl_teacher, dtype=dtype,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_nothing_waits_for_the_gpu_and_no_new_selection_or_length_compiles_anything():
    from msa_kernels.sparse_attention import (
        triton_backward,
        triton_forward,
        triton_kl,
        triton_schedule,
        triton_shared,
        triton_sums,
    )

    modules = (triton_backward, triton_forward, triton_kl, triton_schedule, triton_shared, triton_sums)
    kernels = {
        value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")
    }

    def run(length, seed):
        layout = on_device(packed_layout([length, 77]))
        inputs = make_inputs(layout, length + 77, groups=2, group=4, dim=64, index_dim=64, dtype=DTYPES[0])
        block_ids = random_block_ids(layout, 2, 64, 4, seed=seed)
        leaves = inputs.clones()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sparse_attention(
                *leaves[:3],
                block_ids,
                layout,
                block_size=64,
                index_q=leaves.index_q,
                index_k=leaves.index_k,
                backend="triton",
            )
            torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {kernel: [len(cache[0]) for cache in kernel.device_caches.values()] for kernel in kernels}

    assert run(500, seed=0) == run(777, seed=1)
