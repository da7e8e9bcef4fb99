"""Dtypes of results and size of rounding errors."""

import math

import pytest
import torch
from kernel_oracles import packed_layout, random_inputs
from msa_kernels import block_select, dense_kl, selection_quality, sparse_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_runs_and_losses_are_kept_in_the_accumulation_dtype(dtype):
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    layout = packed_layout([7, 20])
    leaves = random_inputs(27, dtype=dtype).clones()
    index = {"index_q": leaves.index_q, "index_k": leaves.index_k}
    block_ids, index_lse = block_select(*leaves[3:], layout, block_size=3, num_selected_blocks=3)
    for output in (
        sparse_attention(*leaves[:3], block_ids, layout, block_size=3, index_lse=index_lse, **index),
        dense_kl(*leaves[:3], layout, **index),
    ):
        assert (output.out.dtype, output.lse.dtype, output.kl.dtype) == (dtype, accumulation, accumulation)
        gradients = torch.autograd.grad(output.out.float().sum() + output.kl.sum(), leaves)
        assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)
    quality = selection_quality(leaves.q, leaves.k, block_ids, layout, block_size=3, **index)
    assert all(tensor.dtype == accumulation for tensor in quality[:5])


def straightforward(leaves):
    """Causal attention and KL of one document in the dtype of the inputs, every step rounded to it."""
    length, heads, dim = leaves.q.shape
    groups = leaves.k.shape[1]
    k, v = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (leaves.k, leaves.v))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = torch.einsum("qhd,khd->hqk", leaves.q, k) / math.sqrt(dim)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", probabilities, v)
    index_scores = torch.einsum("qrd,kd->rqk", leaves.index_q, leaves.index_k) / math.sqrt(
        leaves.index_q.shape[2]
    )
    log_student = index_scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)
    teacher = probabilities.detach().unflatten(0, (groups, -1)).mean(1)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1).t()
    return out, kl


def dense(leaves):
    layout = packed_layout([leaves.q.shape[0]])
    output = dense_kl(*leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k)
    return output.out, output.kl


def sparse(leaves):
    layout = packed_layout([leaves.q.shape[0]])
    block_ids, _ = block_select(*leaves[3:], layout, block_size=16, num_selected_blocks=8)
    output = sparse_attention(
        *leaves[:3], block_ids, layout, block_size=16, index_q=leaves.index_q, index_k=leaves.index_k
    )
    return output.out, output.kl


def results(attend, inputs, dtype):
    leaves = type(inputs)(*(tensor.to(dtype) for tensor in inputs)).clones()
    out, kl = attend(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    ((out * weights).sum() + kl.sum()).backward()
    return [tensor.detach().double() for tensor in (out, kl, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("attend", [dense, sparse])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_that_of_the_same_dtype_pytorch_code(attend, dtype):
    inputs = random_inputs(100, dim=16, value_dim=16, index_dim=16, dtype=dtype)
    exact = results(straightforward, inputs, torch.float64)
    plain = results(straightforward, inputs, dtype)
    ours = results(attend, inputs, dtype)
    names = ("out", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")
    for name, right, same_dtype, found in zip(names, exact, plain, ours, strict=True):
        error = (found - right).abs().amax()
        allowed = 2 * (same_dtype - right).abs().amax()
        assert error <= allowed, f"{name}: {error} > {allowed}"


def test_autocast_does_not_lower_the_precision():
    inputs = random_inputs(40, dtype=torch.float32)
    layout = packed_layout([40])
    index = {"index_q": inputs.index_q, "index_k": inputs.index_k}
    expected_selection = block_select(*inputs[3:], layout, block_size=3, num_selected_blocks=3)
    expected = dense_kl(*inputs[:3], layout, **index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = block_select(*inputs[3:], layout, block_size=3, num_selected_blocks=3)
        output = dense_kl(*inputs[:3], layout, **index)
    assert torch.equal(selection.index_lse, expected_selection.index_lse)
    assert torch.equal(output.out, expected.out)
    assert torch.equal(output.kl, expected.kl)
