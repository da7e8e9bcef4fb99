"""The Hopper kernels of sparse_attention against Triton's own, chunk by chunk, on a GPU.

What they compute is compared with plain PyTorch in test_sparse_attention_accuracy_triton.py.
"""

import math

import pytest
import torch
from attention_checks import make_inputs, on_device, random_block_ids
from kernel_oracles import packed_layout
from msa_kernels import sparse_attention
from triton_interpreter import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(
        DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]

SHAPES = [
    # lengths, groups, heads per group, dim, block size, slots, dtype
    ([3000], 4, 16, 128, 128, 16, torch.bfloat16),
    ([700, 1, 0, 2300], 2, 16, 128, 64, 5, torch.float16),
    ([1111, 900], 8, 8, 64, 64, 4, torch.bfloat16),
    ([2500], 3, 8, 128, 128, 3, torch.float16),
    ([127, 64, 1], 1, 16, 64, 128, 2, torch.bfloat16),  # nothing but shared blocks
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_attention_of_the_rest_and_gradients_are_those_of_the_other_kernels(shape, num_chunks, monkeypatch):
    from msa_kernels.sparse_attention import (
        hopper_backward,
        hopper_rest,
        triton_backward,
        triton_forward,
        triton_op,
    )

    lengths, groups, group, dim, block_size, slots, dtype = shape
    layout = on_device(packed_layout(lengths))
    inputs = make_inputs(layout, sum(lengths), groups=groups, group=group, dim=dim, index_dim=64, dtype=dtype)
    block_ids = random_block_ids(layout, groups, block_size, slots, favourite=1)
    queries = 64 * math.ceil(sum(lengths) / num_chunks / 64)
    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", queries * slots * groups * group * dim * 2)
    calls = {"rest": 0, "backward": 0}

    def counted(name, kernel):
        def call(*arguments, **options):
            calls[name] += 1
            return kernel(*arguments, **options)

        return call

    def run(attend_rest, differentiate):
        monkeypatch.setattr(hopper_rest, "attend_rest", counted("rest", attend_rest))
        monkeypatch.setattr(hopper_backward, "differentiate", counted("backward", differentiate))
        gradients = []
        # All gradients, then those of the attention alone, whose kernel leaves the teacher out.
        for with_kl in (True, False):
            leaves = inputs.clones()
            index = {"index_q": leaves.index_q, "index_k": leaves.index_k} if with_kl else {}
            found = sparse_attention(
                *leaves[:3], block_ids, layout, block_size=block_size, backend="triton", **index
            )
            loss = found.out.float().sin().sum() + (found.kl.sum() if with_kl else 0)
            gradients += torch.autograd.grad(loss, leaves if with_kl else leaves[:3])
        return found.out, found.lse, *gradients

    found = run(hopper_rest.attend_rest, hopper_backward.differentiate)
    takes_backward = dim == block_size == 128
    assert calls == {"rest": 2 * num_chunks, "backward": 2 * num_chunks * takes_backward}
    expected = run(triton_forward.attend_rest, triton_backward.differentiate)
    for ours, others in zip(found, expected, strict=True):
        assert torch.equal(ours, others)


def shared_attention(kernel, inputs, schedule):
    """out and lse, whose unwritten elements are NaN."""
    q, k, v = inputs[:3]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    kernel(q, k, v, schedule, out, lse, softmax_scale=q.shape[2] ** -0.5)
    return out, lse


def new_schedule(block_ids, layout, num_keys, group, block_size):
    from msa_kernels.sparse_attention.triton_schedule import KeyBlockTable, Schedule

    blocks = KeyBlockTable.build(layout, num_keys, block_size)
    return Schedule.build(block_ids, layout, blocks, group=group, block_size=block_size, entries_per_item=64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("choose", ["few in common", "most in common"])
def test_attention_of_shared_blocks_is_close_to_that_of_the_other_kernel(shape, choose):
    from msa_kernels.sparse_attention import hopper_shared, triton_shared

    lengths, groups, group, dim, block_size, slots, dtype = shape
    layout = on_device(packed_layout(lengths))
    inputs = make_inputs(layout, sum(lengths), groups=groups, group=group, dim=dim, index_dim=64, dtype=dtype)
    block_ids = random_block_ids(layout, groups, block_size, slots, favourite=1)
    if choose == "most in common":
        # Five of eight neighbours choose what the first chose, as far as they see it.
        number = torch.arange(sum(lengths), device=DEVICE)
        same = block_ids[number - number % 8]
        sees_it = same.amax((1, 2)) <= layout.query_position // block_size
        document = layout.query_document
        follows = (number % 8 < 5) & sees_it & (document == document[number - number % 8])
        block_ids = torch.where(follows[:, None, None], same, block_ids)
    schedule = new_schedule(block_ids, layout, sum(lengths), group, block_size)
    out, lse = shared_attention(hopper_shared.attend_shared, inputs, schedule)
    other_out, other_lse = shared_attention(triton_shared.attend_shared, inputs, schedule)
    # Blocks in one step instead of two: the weights are rounded relative to another maximum.
    unit = torch.finfo(dtype).eps
    assert ((out.float() - other_out.float()).abs() <= 2 * unit * (1 + other_out.float().abs())).all()
    empty = other_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert (lse - other_lse)[~empty].abs().max() <= 1e-5


def test_queries_that_share_nothing_get_zeros():
    from msa_kernels.sparse_attention import hopper_shared

    layout = on_device(packed_layout([1200]))
    inputs = make_inputs(layout, 1200, groups=2, group=16, dim=128, index_dim=64, dtype=torch.bfloat16)
    query = torch.arange(1200, device=DEVICE)
    block_ids = torch.full((1200, 2, 3), -1, dtype=torch.int32, device=DEVICE)
    # Eight neighbours with eight different blocks, none of them their own; the first queries have own ones.
    block_ids[:, :, 0] = torch.where(query < 1152, query // 128, query % 8)[:, None].int()
    schedule = new_schedule(block_ids, layout, 1200, 16, 128)
    out, lse = shared_attention(hopper_shared.attend_shared, inputs, schedule)
    assert (out[1152:] == 0).all()
    assert (lse[1152:] == -math.inf).all()
    assert (out[:1152] != 0).any(2).all()
    assert lse[:1152].isfinite().all()


@pytest.mark.parametrize("budget", [1, 2**40])
def test_a_graph_replays_with_other_values_and_another_selection(budget, monkeypatch):
    from msa_kernels.sparse_attention import triton_op

    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", budget)  # 64 queries a chunk, or one chunk
    layout = on_device(packed_layout([600, 200]))

    def values(seed):
        inputs = make_inputs(
            layout, 800, groups=2, group=16, dim=128, index_dim=64, dtype=torch.bfloat16, seed=seed
        )
        return [*inputs[:3], random_block_ids(layout, 2, 64, 4, seed=seed)]

    def run(arguments):
        with torch.no_grad():
            return sparse_attention(*arguments, layout, block_size=64, backend="triton").out

    static = values(0)
    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for seed in (1, 2):
        fresh = values(seed)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out, run(fresh))
