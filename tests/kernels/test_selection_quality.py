import math

import pytest
import torch
from kernel_oracles import LENGTHS, dot, packed_layout, random_inputs, softmax, visible_tokens
from msa_kernels import block_select, selection_quality


def quality(inputs, block_ids, layout, block_size):
    index = {"index_q": inputs.index_q, "index_k": inputs.index_k}
    return selection_quality(inputs.q, inputs.k, block_ids, layout, block_size=block_size, **index)


def block_masses(inputs, layout, query, group, block_size):
    """Probability of full attention on each visible block, averaged over the heads of the group."""
    heads, groups = inputs.q.shape[1], inputs.k.shape[1]
    tokens = visible_tokens(layout, query, None)
    masses = [0.0] * (int(layout.query_position[query]) // block_size + 1)
    for head in range(group * heads // groups, (group + 1) * heads // groups):
        scores = [dot(inputs.q[query, head], inputs.k[token, group]) for token in tokens]
        weights = softmax([score / math.sqrt(inputs.q.shape[2]) for score in scores])
        for position, weight in enumerate(weights):
            masses[position // block_size] += weight * groups / heads
    return masses


def best_blocks(masses, count):
    return sorted(range(len(masses)), key=lambda block: (-masses[block], block))[:count]


def index_shares(inputs, layout, query, group, blocks, block_size):
    """Probability of the index branch on each of ``blocks``."""
    tokens = visible_tokens(layout, query, blocks, block_size)
    start = visible_tokens(layout, query, None)[0]
    scores = [dot(inputs.index_q[query, group], inputs.index_k[token]) for token in tokens]
    weights = softmax([score / math.sqrt(inputs.index_q.shape[2]) for score in scores])
    shares = dict.fromkeys(blocks, 0.0)
    for token, weight in zip(tokens, weights, strict=True):
        shares[(token - start) // block_size] += weight
    return shares


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_metric_is_the_brute_force_one(lengths, count, block_size):
    layout = packed_layout(lengths)
    inputs = random_inputs(sum(lengths))
    block_ids, _ = block_select(*inputs[3:], layout, block_size=block_size, num_selected_blocks=count)
    found = quality(inputs, block_ids, layout, block_size)
    for query in range(layout.num_queries):
        local = int(layout.query_position[query]) // block_size
        assert bool(found.drops_blocks[query]) == (local + 1 > count)
        for group in range(2):
            masses = block_masses(inputs, layout, query, group, block_size)
            best = best_blocks(masses, count)
            chosen = [block for block in block_ids[query, group].tolist() if block >= 0]
            hit = [block for block in best if block in chosen]
            shares = index_shares(inputs, layout, query, group, chosen, block_size)
            expected = (
                len(hit) / len(best),
                sum(masses[block] for block in hit) / sum(masses[block] for block in best),
                -sum(share * math.log(share) for share in shares.values()),
                shares[local],
                shares.get(0, 0.0),
            )
            values = [column[query, group].item() for column in found[:5]]
            assert values == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_perfect_selection_has_recall_one():
    layout = packed_layout([40, 20])
    inputs = random_inputs(60)
    best = [
        [best_blocks(block_masses(inputs, layout, query, group, 4), 3) for group in range(2)]
        for query in range(60)
    ]
    padded = [[blocks + [-1] * (3 - len(blocks)) for blocks in row] for row in best]
    found = quality(inputs, torch.tensor(padded, dtype=torch.int32), layout, 4)
    assert (found.block_recall == 1).all()
    assert (found.score_recall == 1).all()


def test_rows_that_drop_no_block_have_recall_one():
    layout = packed_layout([40])
    inputs = random_inputs(40)
    block_ids, _ = block_select(*inputs[3:], layout, block_size=4, num_selected_blocks=3)
    found = quality(inputs, block_ids, layout, 4)
    assert found.drops_blocks.tolist() == [position >= 12 for position in range(40)]
    assert (found.block_recall[~found.drops_blocks] == 1).all()
    assert (found.block_recall[found.drops_blocks] < 1).any()


def test_equal_masses_count_for_the_lower_block_id():
    layout = packed_layout([8]).select_queries(torch.tensor([7]))
    inputs = random_inputs(8, heads=1, groups=1)
    inputs = inputs._replace(q=torch.zeros_like(inputs.q[:1]), index_q=inputs.index_q[:1])
    for chosen, recall in ([0, 1], 1.0), ([0, 3], 0.5), ([2, 3], 0.0):
        block_ids = torch.tensor([[chosen]], dtype=torch.int32)
        assert quality(inputs, block_ids, layout, 2).block_recall.item() == recall


def test_sampled_queries_give_the_rows_of_the_full_call():
    layout = packed_layout([25, 0, 15])
    inputs = random_inputs(40)
    block_ids, _ = block_select(*inputs[3:], layout, block_size=3, num_selected_blocks=3)
    full = quality(inputs, block_ids, layout, 3)
    rows = torch.tensor([39, 3, 24, 12])
    sampled = inputs._replace(q=inputs.q[rows], index_q=inputs.index_q[rows])
    part = quality(sampled, block_ids[rows], layout.select_queries(rows), 3)
    torch.testing.assert_close(list(part), [column[rows] for column in full])


def test_a_row_of_padding_finds_nothing_and_is_not_nan():
    layout = packed_layout([9])
    inputs = random_inputs(9)
    found = quality(inputs, torch.full((9, 2, 2), -1, dtype=torch.int32), layout, 3)
    assert all((column == 0).all() for column in found[:5])


def test_metrics_carry_no_gradient():
    layout = packed_layout([9])
    leaves = random_inputs(9).clones()
    block_ids, _ = block_select(*leaves[3:], layout, block_size=3, num_selected_blocks=2)
    assert not any(column.requires_grad for column in quality(leaves, block_ids, layout, 3))
