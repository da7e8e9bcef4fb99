import math

import pytest
import torch
from kernel_oracles import (
    LENGTHS,
    assert_selection_is_brute_force,
    dot,
    logsumexp,
    packed_layout,
    random_inputs,
    visible_tokens,
)
from msa_kernels import DocumentLayout, block_select
from msa_kernels.block_select import e4m3


def integer_index(num_keys, groups=2, dim=4, high=3, seed=0):
    """Index inputs whose scores are small integers: exact in any precision, with ties nearly everywhere."""
    generator = torch.Generator().manual_seed(seed)
    index_q = torch.randint(-1, 2, (num_keys, groups, dim), generator=generator).float()
    index_k = torch.randint(0, high, (num_keys, dim), generator=generator).float()
    return index_q, index_k


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 2, 4, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_selection_with_ties_is_exactly_the_brute_force_one(lengths, count, block_size):
    layout = packed_layout(lengths)
    index_q, index_k = integer_index(sum(lengths))
    selection = block_select(index_q, index_k, layout, block_size=block_size, num_selected_blocks=count)
    assert_selection_is_brute_force(selection.block_ids, index_q, index_k, layout, block_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_selection_of_random_scores_is_exactly_the_brute_force_one(dtype):
    layout = packed_layout([21, 0, 40])
    inputs = random_inputs(61, dtype=dtype, groups=3, heads=3)
    block_ids, _ = block_select(inputs.index_q, inputs.index_k, layout, block_size=3, num_selected_blocks=4)
    assert_selection_is_brute_force(block_ids, inputs.index_q, inputs.index_k, layout, 3)


def test_groups_select_independently():
    inputs = random_inputs(64, groups=2)
    layout = DocumentLayout.dense_batch(1, 64, device="cpu")
    block_ids, _ = block_select(inputs.index_q, inputs.index_k, layout, block_size=4, num_selected_blocks=4)
    assert not torch.equal(block_ids[:, 0], block_ids[:, 1])


def test_equal_scores_go_to_the_lower_block_id():
    layout = DocumentLayout.dense_batch(1, 12, device="cpu")
    index_q, index_k = torch.ones(12, 1, 2), torch.ones(12, 2)
    block_ids, _ = block_select(index_q, index_k, layout, block_size=2, num_selected_blocks=3)
    assert block_ids[-1, 0].tolist() == [0, 1, 5]
    assert block_ids[5, 0].tolist() == [0, 1, 2]


def test_the_first_token_of_a_block_selects_its_own_block():
    layout = DocumentLayout.dense_batch(1, 9, device="cpu")
    index_q = torch.ones(9, 1, 1)
    index_k = torch.arange(9.0, 0.0, -1.0)[:, None]  # the local block always has the lowest score
    block_ids, _ = block_select(index_q, index_k, layout, block_size=4, num_selected_blocks=1)
    assert block_ids[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_only_visible_tokens_count_for_a_block_score():
    # Token 5 has the highest score of all but lies behind query 4; both are in the local block 1.
    layout = DocumentLayout.dense_batch(1, 6, device="cpu").select_queries(torch.tensor([4]))
    index_k = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.5, 100.0])[:, None]
    _, index_lse = block_select(
        torch.ones(1, 1, 1), index_k, layout, block_size=4, num_selected_blocks=2, softmax_scale=1.0
    )
    assert index_lse.item() == pytest.approx(logsumexp([1.0, 0.0, 0.0, 2.0, 0.5]))


def test_fewer_visible_blocks_than_slots_leave_padding_behind_the_local_block():
    layout = DocumentLayout.dense_batch(1, 6, device="cpu")
    index_q, index_k = integer_index(6, groups=1)
    block_ids, _ = block_select(index_q, index_k, layout, block_size=4, num_selected_blocks=3)
    assert block_ids[0, 0].tolist() == [0, -1, -1]
    assert block_ids[5, 0].tolist() == [0, 1, -1]


def test_nan_scores_rank_last():
    layout = DocumentLayout.dense_batch(1, 10, device="cpu")
    index_q, index_k = integer_index(10, groups=1, high=2)
    index_q.fill_(-1)
    index_k[2:4] = math.nan  # block 1: every score is NaN
    index_k[4] = math.nan  # block 2: token 5 still counts
    index_k[5] = -100  # and is the best score of all
    for count in (1, 2, 4, 5):
        block_ids, _ = block_select(index_q, index_k, layout, block_size=2, num_selected_blocks=count)
        assert_selection_is_brute_force(block_ids, index_q, index_k, layout, 2)
    block_ids, _ = block_select(index_q, index_k, layout, block_size=2, num_selected_blocks=4)
    assert sorted(block_ids[9, 0].tolist()) == [0, 2, 3, 4]
    assert block_ids[9, 0, 0] == 2


def test_a_query_of_nan_takes_the_lowest_ids_and_nothing_invisible():
    layout = packed_layout([9, 9])
    index_q, index_k = integer_index(18, groups=1)
    index_q[7] = math.nan
    block_ids, index_lse = block_select(index_q, index_k, layout, block_size=2, num_selected_blocks=3)
    assert block_ids[7, 0].tolist() == [0, 1, 3]
    assert index_lse[7].isnan().all()
    assert not index_lse[:7].isnan().any()
    assert not index_lse[8:].isnan().any()


def test_any_subset_of_queries_in_any_order_gets_the_rows_of_the_full_call():
    layout = packed_layout([7, 0, 1, 30])
    index_q, index_k = integer_index(38)
    full = block_select(index_q, index_k, layout, block_size=3, num_selected_blocks=4)
    rows = torch.randperm(38, generator=torch.Generator().manual_seed(1))[:17]
    part = block_select(
        index_q[rows], index_k, layout.select_queries(rows), block_size=3, num_selected_blocks=4
    )
    assert torch.equal(part.block_ids, full.block_ids[rows])
    torch.testing.assert_close(part.index_lse, full.index_lse[rows])


def test_a_loose_bound_of_the_document_length_changes_nothing():
    offsets = torch.tensor([0, 7, 7, 20])
    index_q, index_k = integer_index(20)
    options = {"block_size": 3, "num_selected_blocks": 3}
    tight = block_select(index_q, index_k, DocumentLayout.from_document_offsets(offsets), **options)
    loose_layout = DocumentLayout.from_document_offsets(offsets, max_document_length=100)
    loose = block_select(index_q, index_k, loose_layout, **options)
    assert torch.equal(tight.block_ids, loose.block_ids)
    assert torch.equal(tight.index_lse, loose.index_lse)


def test_no_queries_select_nothing():
    layout = packed_layout([5]).select_queries(slice(0, 0))
    block_ids, index_lse = block_select(
        torch.ones(0, 2, 4), torch.ones(5, 4), layout, block_size=2, num_selected_blocks=3
    )
    assert block_ids.shape == (0, 2, 3)
    assert index_lse.shape == (0, 2)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_index_lse_is_the_logsumexp_over_the_selected_visible_tokens(count):
    layout = packed_layout([7, 0, 14])
    inputs = random_inputs(21)
    block_ids, index_lse = block_select(
        inputs.index_q, inputs.index_k, layout, block_size=3, num_selected_blocks=count
    )
    assert index_lse.dtype == torch.float64
    for query in range(21):
        for group in range(2):
            tokens = visible_tokens(layout, query, block_ids[query, group].tolist(), block_size=3)
            scores = [dot(inputs.index_q[query, group], inputs.index_k[token]) / 2 for token in tokens]
            assert index_lse[query, group].item() == pytest.approx(logsumexp(scores), rel=1e-12)


def test_the_scale_changes_the_lse_and_not_the_selection():
    layout = packed_layout([40])
    inputs = random_inputs(40)
    options = {"block_size": 4, "num_selected_blocks": 3}
    plain = block_select(inputs.index_q, inputs.index_k, layout, **options)
    scaled = block_select(inputs.index_q, inputs.index_k, layout, softmax_scale=0.01, **options)
    assert torch.equal(plain.block_ids, scaled.block_ids)
    assert not torch.allclose(plain.index_lse, scaled.index_lse)


def test_the_key_may_have_a_head_dimension_of_one():
    layout = packed_layout([10])
    index_q, index_k = integer_index(10)
    options = {"block_size": 3, "num_selected_blocks": 2}
    flat = block_select(index_q, index_k, layout, **options)
    with_head = block_select(index_q, index_k[:, None], layout, **options)
    assert torch.equal(flat.block_ids, with_head.block_ids)


def test_selection_carries_no_gradient():
    layout = packed_layout([10])
    index_q, index_k = (tensor.requires_grad_() for tensor in integer_index(10))
    selection = block_select(index_q, index_k, layout, block_size=3, num_selected_blocks=2)
    assert not selection.index_lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_runs_and_integer_scores_agree_exactly(dtype):
    layout = packed_layout([7, 20])
    index_q, index_k = integer_index(27)
    options = {"block_size": 3, "num_selected_blocks": 3}
    expected = block_select(index_q.double(), index_k.double(), layout, **options)
    block_ids, index_lse = block_select(index_q.to(dtype), index_k.to(dtype), layout, **options)
    assert torch.equal(block_ids, expected.block_ids)
    assert index_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(index_lse.double(), expected.index_lse, rtol=1e-6, atol=1e-6)


def test_without_the_lse_the_same_blocks_are_selected():
    layout = packed_layout([21, 0, 40])
    index_q, index_k = integer_index(61)
    options = {"block_size": 3, "num_selected_blocks": 4}
    with_lse = block_select(index_q, index_k, layout, **options)
    without = block_select(index_q, index_k, layout, with_lse=False, **options)
    assert without.index_lse is None
    assert torch.equal(without.block_ids, with_lse.block_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_e4m3_takes_the_nearest_of_its_numbers_with_a_scale_of_two(dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 16, generator=generator) * torch.logspace(-6, 4, 40)[:, None]
    vectors[7] = 0
    vectors[8, 1:] *= 1e-4  # most entries far below the largest
    vectors = vectors.to(dtype)
    values, scales = e4m3.quantise(vectors)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (40,)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full((40,), 0.5))
    scaled = vectors.double() / scales.double()[:, None]
    largest = scaled.abs().amax(dim=-1)
    assert (largest <= 448).all()
    assert (largest[vectors.abs().amax(dim=-1) > 0] >= 224).all()
    distance = (scaled[..., None] - numbers).abs().amin(dim=-1)
    torch.testing.assert_close((values.double() - scaled).abs(), distance, rtol=0, atol=1e-12)


def test_e4m3_selects_by_the_scores_of_the_rounded_vectors():
    layout = packed_layout([21, 0, 40])
    inputs = random_inputs(61, dtype=torch.float32, groups=3, heads=3, index_dim=16)
    inputs.index_k[30:] *= 1e-3  # a scale per token
    options = {"block_size": 3, "num_selected_blocks": 4, "with_lse": False}
    found = block_select(inputs.index_q, inputs.index_k, layout, score_dtype="e4m3", **options)
    values, _ = e4m3.quantise(inputs.index_q)
    keys, scales = e4m3.quantise(inputs.index_k)
    rounded_k = keys.double() * scales[:, None]
    assert_selection_is_brute_force(found.block_ids, values.double(), rounded_k, layout, 3)
    exact = block_select(inputs.index_q, inputs.index_k, layout, **options)
    assert not torch.equal(found.block_ids, exact.block_ids)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_e4m3_ranks_tokens_that_are_not_finite_last(value):
    layout = DocumentLayout.dense_batch(1, 10, device="cpu")
    index_q, index_k = torch.ones(10, 1, 4), torch.ones(10, 4)
    index_k[2:4, 1] = value  # all of block 1
    index_k[4, 2] = value  # half of block 2
    options = {"block_size": 2, "num_selected_blocks": 4, "with_lse": False, "score_dtype": "e4m3"}
    block_ids = block_select(index_q, index_k, layout, **options).block_ids
    assert block_ids[9, 0].tolist() == [0, 2, 3, 4]
