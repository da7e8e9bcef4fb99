"""The KL loss of sparse_attention and dense_kl."""

import math

import pytest
import torch
from kernel_oracles import LENGTHS, brute_force_attention, packed_layout, random_inputs
from msa_kernels import AttentionOutput, block_select, dense_kl, sparse_attention

TEACHERS = ["group_mean", "per_head"]


def attend(inputs, layout, *, dense, block_size=2, count=2, **options) -> AttentionOutput:
    index = {"index_q": inputs.index_q, "index_k": inputs.index_k}
    if dense:
        return dense_kl(*inputs[:3], layout, **index, **options)
    block_ids, index_lse = block_select(
        inputs.index_q, inputs.index_k, layout, block_size=block_size, num_selected_blocks=count
    )
    return sparse_attention(
        *inputs[:3], block_ids, layout, block_size=block_size, index_lse=index_lse, **index, **options
    )


both = pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])


@pytest.mark.parametrize("kl_teacher", TEACHERS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sparse_kl_is_the_brute_force_one(lengths, kl_teacher):
    layout = packed_layout(lengths)
    inputs = random_inputs(sum(lengths))
    block_ids, _ = block_select(inputs.index_q, inputs.index_k, layout, block_size=3, num_selected_blocks=3)
    expected = brute_force_attention(inputs, layout, block_ids, 3)
    found = attend(inputs, layout, dense=False, block_size=3, count=3, kl_teacher=kl_teacher)
    torch.testing.assert_close(found.kl, getattr(expected, f"kl_{kl_teacher}"))


@pytest.mark.parametrize("kl_teacher", TEACHERS)
def test_dense_kl_is_the_brute_force_one(kl_teacher):
    layout = packed_layout([7, 1, 0, 16, 5])
    inputs = random_inputs(29)
    expected = brute_force_attention(inputs, layout, None)
    found = attend(inputs, layout, dense=True, kl_teacher=kl_teacher)
    torch.testing.assert_close(found.kl, getattr(expected, f"kl_{kl_teacher}"))


def test_kl_of_two_tokens_is_the_formula_by_hand():
    # Query 1 sees two tokens. Its two heads attend with (3/4, 1/4) and (1/4, 3/4), the index branch with
    # (2/3, 1/3): the scores are the logarithms of these odds.
    layout = packed_layout([2])
    q = torch.zeros(2, 2, 1, dtype=torch.float64)
    q[1] = torch.tensor([[math.log(3)], [-math.log(3)]])
    first_key = torch.tensor([1.0, 0.0], dtype=torch.float64)
    index_q = torch.zeros(2, 1, 1, dtype=torch.float64)
    index_q[1] = math.log(2)
    arguments = (q, first_key[:, None, None], first_key[:, None, None], layout)
    index = {"index_q": index_q, "index_k": first_key[:, None]}

    mean = dense_kl(*arguments, **index).kl
    by_hand = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert mean[:, 0].tolist() == pytest.approx([0.0, by_hand])

    per_head = dense_kl(*arguments, **index, kl_teacher="per_head").kl
    head_0 = 0.75 * math.log(0.75 / (2 / 3)) + 0.25 * math.log(0.25 / (1 / 3))
    head_1 = 0.25 * math.log(0.25 / (2 / 3)) + 0.75 * math.log(0.75 / (1 / 3))
    assert per_head[:, 0].tolist() == pytest.approx([0.0, (head_0 + head_1) / 2])


@both
@pytest.mark.parametrize("kl_teacher", TEACHERS)
def test_gradients_of_kl_pass_gradcheck(dense, kl_teacher):
    layout = packed_layout([5, 0, 1, 7])
    inputs = random_inputs(13, dim=3, value_dim=2, index_dim=2)
    block_ids, _ = block_select(inputs.index_q, inputs.index_k, layout, block_size=2, num_selected_blocks=2)

    def divergence(index_q, index_k):
        index = {"index_q": index_q, "index_k": index_k, "kl_teacher": kl_teacher}
        if dense:
            return dense_kl(*inputs[:3], layout, **index).kl
        return sparse_attention(*inputs[:3], block_ids, layout, block_size=2, **index).kl

    leaves = inputs.clones()
    assert torch.autograd.gradcheck(divergence, (leaves.index_q, leaves.index_k))


@both
def test_the_gradient_in_the_index_scores_is_student_minus_teacher(dense):
    # With one-hot index keys, the gradient of index_q in dimension j is that of the score of token j.
    layout = packed_layout([6])
    inputs = random_inputs(6, heads=2, groups=1, index_dim=6)
    leaves = inputs._replace(index_k=torch.eye(6, dtype=torch.float64)).clones()
    output = attend(leaves, layout, dense=dense, count=5, index_softmax_scale=1.0)
    (gradient,) = torch.autograd.grad(output.kl.sum(), leaves.index_q)
    for query in range(6):
        scores = torch.einsum("hd,jd->hj", inputs.q[query], inputs.k[: query + 1, 0]) / math.sqrt(6)
        teacher = scores.softmax(-1).mean(0)
        student = inputs.index_q[query, 0, : query + 1].softmax(-1)
        torch.testing.assert_close(gradient[query, 0, : query + 1], student - teacher)
        assert (gradient[query, 0, query + 1 :] == 0).all()


@both
@pytest.mark.parametrize("kl_teacher", TEACHERS)
def test_kl_reaches_no_main_input(dense, kl_teacher):
    leaves = random_inputs(13).clones()
    output = attend(leaves, packed_layout([5, 8]), dense=dense, kl_teacher=kl_teacher)
    gradients = torch.autograd.grad(output.kl.sum(), leaves, allow_unused=True)
    assert gradients[:3] == (None, None, None)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[3:])


@both
def test_the_teachers_differ_by_a_constant_of_the_teacher_and_have_the_same_gradient(dense):
    layout = packed_layout([5, 8])
    inputs = random_inputs(13)
    options = {
        "block_size": 2,
        "count": 20,
    }  # every block, so that the token set does not depend on the student
    gaps = []
    for seed in (1, 2):
        student = random_inputs(13, seed=seed)
        leaves = inputs._replace(index_q=student.index_q, index_k=student.index_k).clones()
        kl, gradients = {}, {}
        for kl_teacher in TEACHERS:
            kl[kl_teacher] = attend(leaves, layout, dense=dense, kl_teacher=kl_teacher, **options).kl
            gradients[kl_teacher] = torch.autograd.grad(kl[kl_teacher].sum(), leaves[3:])
        torch.testing.assert_close(gradients["per_head"], gradients["group_mean"])
        gaps.append((kl["per_head"] - kl["group_mean"]).detach())
    torch.testing.assert_close(gaps[0], gaps[1])
    assert (gaps[0] >= -1e-12).all()
    assert gaps[0].max() > 0.01


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kl_is_not_negative(dense, dtype):
    inputs = random_inputs(60, dtype=dtype)
    kl = attend(inputs, packed_layout([20, 40]), dense=dense).kl
    assert (kl >= -1e-6).all()
    assert kl.max() > 0.01


@both
@pytest.mark.parametrize("kl_teacher", TEACHERS)
def test_kl_is_zero_when_the_student_is_the_teacher(dense, kl_teacher):
    inputs = random_inputs(20, heads=1, groups=1)
    inputs = inputs._replace(index_q=inputs.q, index_k=inputs.k[:, 0])
    kl = attend(inputs, packed_layout([20]), dense=dense, kl_teacher=kl_teacher).kl
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-14)


@both
def test_huge_scores_give_finite_kl_and_gradients(dense):
    # Softmax underflows to exact zeros in teacher and student.
    inputs = random_inputs(20, dtype=torch.float32)
    leaves = inputs._replace(q=inputs.q * 1e4, index_q=inputs.index_q * 1e4).clones()
    output = attend(leaves, packed_layout([20]), dense=dense, kl_teacher="per_head")
    gradients = torch.autograd.grad(output.kl.sum() + output.out.sum(), leaves)
    assert output.kl.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@both
def test_kl_has_a_value_under_no_grad(dense):
    inputs = random_inputs(13)
    layout = packed_layout([5, 8])
    with torch.no_grad():
        without_grad = attend(inputs.clones(), layout, dense=dense).kl
    assert not without_grad.requires_grad
    torch.testing.assert_close(without_grad, attend(inputs, layout, dense=dense).kl)


def test_the_handed_over_lse_changes_nothing_in_the_reference():
    layout = packed_layout([13])
    inputs = random_inputs(13)
    options = {"block_size": 2, "index_q": inputs.index_q, "index_k": inputs.index_k}
    block_ids, index_lse = block_select(
        inputs.index_q, inputs.index_k, layout, block_size=2, num_selected_blocks=2
    )
    with_lse = sparse_attention(*inputs[:3], block_ids, layout, index_lse=index_lse, **options)
    without = sparse_attention(*inputs[:3], block_ids, layout, **options)
    assert torch.equal(with_lse.kl, without.kl)


def test_the_index_key_may_have_a_head_dimension_of_one():
    leaves = random_inputs(13).clones()
    layout = packed_layout([13])
    flat = dense_kl(*leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k)
    with_head = dense_kl(*leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k[:, None])
    assert torch.equal(flat.kl, with_head.kl)
    with_head.kl.sum().backward()
    assert leaves.index_k.grad.shape == (13, 4)
