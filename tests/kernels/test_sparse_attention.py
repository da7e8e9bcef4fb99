"""Attention outputs and their gradients; the KL loss is tested in test_kl_loss.py."""

import functools

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import LENGTHS, brute_force_attention, packed_layout, random_inputs
from msa_kernels import DocumentLayout, block_select, dense_kl, sparse_attention


def select(inputs, layout, block_size, count):
    return block_select(
        inputs.index_q, inputs.index_k, layout, block_size=block_size, num_selected_blocks=count
    )


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_out_and_lse_are_the_brute_force_ones_over_the_selected_tokens(lengths, block_size):
    layout = packed_layout(lengths)
    inputs = random_inputs(sum(lengths))
    block_ids, index_lse = select(inputs, layout, block_size, count=2)
    expected = brute_force_attention(inputs, layout, block_ids, block_size)
    found = sparse_attention(*inputs[:3], block_ids, layout, block_size=block_size)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)
    torch.testing.assert_close(index_lse, expected.index_lse)
    assert found.kl is None


@pytest.mark.parametrize("lengths", LENGTHS[:4], ids=str)
def test_dense_out_and_lse_are_the_brute_force_ones_over_all_visible_tokens(lengths):
    layout = packed_layout(lengths)
    inputs = random_inputs(sum(lengths))
    expected = brute_force_attention(inputs, layout, None)
    found = dense_kl(*inputs[:3], layout)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)
    assert found.kl is None


def outputs_and_gradients(attend, inputs):
    leaves = inputs.clones()
    output = attend(leaves)
    weights = torch.randn(output.out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = (output.out * weights).sum()
    if output.kl is not None:
        loss = loss + (output.kl * torch.arange(1.0, output.kl.numel() + 1).view_as(output.kl)).sum()
    loss.backward()
    return output, [leaf.grad for leaf in leaves]


def test_with_every_block_selected_sparse_equals_dense_in_outputs_and_every_gradient():
    layout = packed_layout([7, 1, 0, 16, 5])
    inputs = random_inputs(29)
    block_ids, index_lse = select(inputs, layout, block_size=3, count=6)

    def sparse(leaves):
        index = {"index_q": leaves.index_q, "index_k": leaves.index_k}
        return sparse_attention(*leaves[:3], block_ids, layout, block_size=3, **index)

    def dense(leaves):
        return dense_kl(*leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k)

    sparse_output, sparse_gradients = outputs_and_gradients(sparse, inputs)
    dense_output, dense_gradients = outputs_and_gradients(dense, inputs)
    torch.testing.assert_close(sparse_output, dense_output)
    torch.testing.assert_close(sparse_gradients, dense_gradients)
    torch.testing.assert_close(index_lse, brute_force_attention(inputs, layout, None).index_lse)


def test_dense_equals_torch_attention_in_output_and_every_gradient():
    batch, length = 2, 11
    layout = DocumentLayout.dense_batch(batch, length, device="cpu")
    inputs = random_inputs(batch * length, heads=6, groups=2)
    leaves, torch_leaves = inputs.clones(), inputs.clones()
    out = dense_kl(*leaves[:3], layout).out
    q, k, v = (tensor.unflatten(0, (batch, length)).transpose(1, 2) for tensor in torch_leaves[:3])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for leaf, torch_leaf in zip(leaves[:3], torch_leaves[:3], strict=True):
        torch.testing.assert_close(leaf.grad, torch_leaf.grad)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_gradients_of_out_pass_gradcheck(dense):
    layout = packed_layout([5, 0, 1, 7])
    inputs = random_inputs(13, dim=3, value_dim=2, index_dim=2)
    block_ids, _ = select(inputs, layout, block_size=2, count=2)
    attend = functools.partial(dense_kl, layout=layout)
    if not dense:
        attend = functools.partial(sparse_attention, block_ids=block_ids, layout=layout, block_size=2)
    leaves = inputs.clones()
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v).out, leaves[:3])


def test_out_reaches_no_index_input_and_lse_carries_no_gradient():
    layout = packed_layout([5, 8])
    leaves = random_inputs(13).clones()
    block_ids, _ = select(leaves, layout, block_size=2, count=2)
    for output in (
        sparse_attention(
            *leaves[:3], block_ids, layout, block_size=2, index_q=leaves.index_q, index_k=leaves.index_k
        ),
        dense_kl(*leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k),
    ):
        assert not output.lse.requires_grad
        gradients = torch.autograd.grad(output.out.sum(), leaves, allow_unused=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients[:3])
        assert gradients[3:] == (None, None)


def test_tokens_of_unselected_blocks_and_of_other_documents_take_no_part():
    layout = packed_layout([12, 12])
    inputs = random_inputs(24).clones()
    block_ids = torch.tensor([0, 2, -1], dtype=torch.int32).repeat(1, 2, 1)
    query = torch.tensor([22])  # position 10 of document 1: block 2 with B = 4
    out = sparse_attention(
        inputs.q[query], inputs.k, inputs.v, block_ids, layout.select_queries(query), block_size=4
    ).out
    out.sum().backward()
    used = inputs.v.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
    assert used == [12, 13, 14, 15, 20, 21, 22]
    assert inputs.k.grad.abs().sum((1, 2)).nonzero().flatten().tolist() == used


def test_the_order_of_block_ids_does_not_matter():
    layout = packed_layout([30])
    inputs = random_inputs(30)
    block_ids, _ = select(inputs, layout, block_size=3, count=4)
    shuffled = block_ids.sort(dim=-1, descending=True).values  # the local block first, padding still last
    first = sparse_attention(*inputs[:3], block_ids, layout, block_size=3)
    second = sparse_attention(*inputs[:3], shuffled, layout, block_size=3)
    assert torch.equal(first.out, second.out)


def test_a_row_of_padding_gives_zero_and_finite_gradients():
    layout = packed_layout([6])
    leaves = random_inputs(6).clones()
    block_ids, _ = select(leaves, layout, block_size=2, count=2)
    block_ids[3] = -1
    for kl_teacher in ("group_mean", "per_head"):
        output = sparse_attention(
            *leaves[:3],
            block_ids,
            layout,
            block_size=2,
            index_q=leaves.index_q,
            index_k=leaves.index_k,
            kl_teacher=kl_teacher,
        )
        assert (output.out[3] == 0).all()
        assert (output.lse[3] == -torch.inf).all()
        assert (output.kl[3] == 0).all()
        gradients = torch.autograd.grad(output.out.sum() + output.kl.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][3] == 0).all()
        assert (gradients[3][3] == 0).all()


def test_no_queries_attend_to_nothing():
    layout = packed_layout([5]).select_queries(slice(0, 0))
    inputs = random_inputs(5)
    block_ids = torch.zeros(0, 2, 3, dtype=torch.int32)
    index = {"index_q": inputs.index_q[:0], "index_k": inputs.index_k}
    for output in (
        sparse_attention(inputs.q[:0], inputs.k, inputs.v, block_ids, layout, block_size=2, **index),
        dense_kl(inputs.q[:0], inputs.k, inputs.v, layout, **index),
    ):
        assert output.out.shape == (0, 4, 5)
        assert output.lse.shape == (0, 4)
        assert output.kl.shape == (0, 2)


def test_the_softmax_scale_is_applied_once():
    layout = packed_layout([9])
    inputs = random_inputs(9)
    scaled = dense_kl(*inputs[:3], layout, softmax_scale=0.3)
    by_hand = dense_kl(inputs.q * 0.3, *inputs[1:3], layout, softmax_scale=1.0)
    torch.testing.assert_close(scaled, by_hand)


def test_a_head_attends_with_the_keys_of_its_own_group():
    layout = packed_layout([6])
    inputs = random_inputs(6, heads=6, groups=3).clones()
    dense_kl(*inputs[:3], layout).out[:, 2:4].sum().backward()
    assert inputs.v.grad.abs().sum((0, 2)).nonzero().flatten().tolist() == [1]
