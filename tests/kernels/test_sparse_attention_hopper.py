"""The Hopper kernel of sparse_attention against Triton's own, chunk by chunk, on a GPU.

What both compute is compared with plain PyTorch in test_sparse_attention_accuracy_triton.py.
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
def test_outputs_are_those_of_the_other_kernel(shape, num_chunks, monkeypatch):
    from msa_kernels.sparse_attention import hopper_forward, triton_forward, triton_op

    lengths, groups, group, dim, block_size, slots, dtype = shape
    layout = on_device(packed_layout(lengths))
    inputs = make_inputs(layout, sum(lengths), groups=groups, group=group, dim=dim, index_dim=64, dtype=dtype)
    block_ids = random_block_ids(layout, groups, block_size, slots, favourite=1)
    launches = []
    original = hopper_forward.attend_rest

    def counted(q, k, v, schedule, *buffers, **options):
        launches.append(int((schedule.kind == 0).sum()))
        original(q, k, v, schedule, *buffers, **options)

    monkeypatch.setattr(hopper_forward, "attend_rest", counted)
    queries = 64 * math.ceil(sum(lengths) / num_chunks / 64)
    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", queries * slots * groups * group * dim * 2)

    def run():
        leaves = inputs.clones()
        found = sparse_attention(
            *leaves[:3], block_ids, layout, block_size=block_size, index_q=leaves.index_q,
            index_k=leaves.index_k, backend="triton",
        )  # fmt: skip
        return *found, *torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)

    found = run()
    assert len(launches) == num_chunks
    assert sum(launches) > 0 or sum(lengths) < 200
    monkeypatch.setattr(triton_forward, "GLUON_VERSIONS", ())
    expected = run()
    assert len(launches) == num_chunks
    for ours, others in zip(found, expected, strict=True):
        assert torch.equal(ours, others)


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
