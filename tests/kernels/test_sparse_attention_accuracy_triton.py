"""Outputs, KL and all five gradients of the Triton kernels of sparse_attention against plain PyTorch in fp64.

Where they run: see `triton_interpreter`.
"""

import pytest
import torch
from attention_checks import DTYPES, assert_close, check
from kernel_oracles import Inputs, packed_layout
from triton_interpreter import DEVICE, needs_triton, slow_in_interpreter

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


SHAPES = [
    # lengths, groups, heads per group, dim, index dim, block size, slots, KL
    ([100, 1, 0, 75], 2, 3, 64, 64, 64, 2, "group_mean"),
    pytest.param(([100, 1, 0, 75], 2, 4, 64, 64, 64, 2, "per_head"), marks=slow_in_interpreter),
    ([1, 0, 140], 1, 16, 128, 64, 64, 2, "group_mean"),
    ([200], 1, 1, 64, 128, 128, 2, "per_head"),
    ([0, 130, 1], 1, 2, 64, 64, 128, 4, "group_mean"),
    ([67, 1], 1, 5, 64, 64, 64, 2, "per_head"),
    ([70], 1, 15, 64, 64, 64, 2, "group_mean"),
    *(
        pytest.param(([67, 1], 2, group, 64, 64, 64, 2, teacher), marks=slow_in_interpreter)
        for group, teacher in [(6, "group_mean"), (7, "per_head"), (9, "group_mean"), (12, "per_head")]
    ),
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
        packed_layout([100, 1, 0, 30]), 131, groups=1, group=3, dim=64, index_dim=64, block_size=64, slots=2,
        kl_teacher="group_mean", dtype=dtype, change=change, compare=assert_close,
    )  # fmt: skip


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
        packed_layout([150, 10]), 160, groups=1, group=6, dim=64, index_dim=64, block_size=64, slots=3,
        kl_teacher="group_mean", dtype=dtype, favourite=0,
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


# A case compiles every kernel anew: one dtype and teacher each.
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize(
    "shape",
    [
        ([700, 0, 501], 2, 3, 128, 128, 128, 4, "per_head", torch.float16),
        ([4500], 1, 6, 64, 64, 64, 64, "group_mean", torch.bfloat16),
        ([900, 1], 2, 12, 128, 64, 64, 5, "per_head", torch.bfloat16),
        ([2500], 1, 16, 128, 128, 128, 16, "group_mean", torch.bfloat16),
    ],
    ids=str,
)
def test_any_number_of_heads_per_group_and_up_to_64_blocks_on_a_gpu(shape):
    lengths, groups, group, dim, index_dim, block_size, slots, kl_teacher, dtype = shape
    check(
        packed_layout(lengths), sum(lengths), groups=groups, group=group, dim=dim, index_dim=index_dim,
        block_size=block_size, slots=slots, kl_teacher=kl_teacher, dtype=dtype,
    )  # fmt: skip
