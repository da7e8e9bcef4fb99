"""Triton kernels of sparse_attention: which inputs get gradients, from which outputs, and their range.

Where they run: see `triton_interpreter`.
"""

import functools
import math

import pytest
import torch
from attention_checks import (
    assert_out_and_kl_reach_inputs_of_their_own,
    make_inputs,
    on_device,
    random_block_ids,
)
from kernel_oracles import Inputs, packed_layout
from msa_kernels import sparse_attention
from torch.utils.checkpoint import checkpoint
from triton_interpreter import needs_triton, slow_in_interpreter

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


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
    assert_out_and_kl_reach_inputs_of_their_own(found, leaves)


@needs_triton
def test_a_second_run_with_activation_recomputation_agrees_in_every_bit():
    layout, inputs, block_ids = small_call()
    leaves = inputs.clones()
    found = checkpoint(lambda *each: attend_small(each, block_ids, layout), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip((*found, *gradients), small_results(), strict=True))


@needs_triton
def test_hooks_on_saved_tensors_may_move_all_that_the_backward_pass_needs(monkeypatch):
    from msa_kernels.sparse_attention import triton_op

    monkeypatch.setattr(triton_op, "MAX_PARTIAL_BYTES", 1)  # two chunks of queries, each with a schedule
    layout, inputs, block_ids = small_call()
    schedules = []

    def move(tensor):
        if not tensor.is_floating_point():
            schedules.append(tensor)
        return tensor.clone()

    def gradients_of(found, leaves):
        return torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)

    leaves = inputs.clones()
    expected = gradients_of(attend_small(leaves, block_ids, layout), leaves)
    with torch.autograd.graph.saved_tensors_hooks(move, lambda moved: moved):
        found = attend_small(leaves, block_ids, layout)
    assert [tensor.shape for tensor in schedules if tensor.dtype == torch.int8] == [(64, 1, 2), (26, 1, 2)]
    for tensor in schedules:
        tensor.zero_()  # reading it, and not the copy, shows
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(found, leaves), expected, strict=True))


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
