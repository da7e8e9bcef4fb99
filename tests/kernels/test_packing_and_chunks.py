"""The same numbers whatever is packed together, computed apart, or cut into chunks."""

import pytest
import torch
from kernel_oracles import Inputs, packed_layout, random_inputs
from msa_kernels import block_select, dense_kl, selection_quality, sparse_attention
from msa_kernels.common import chunks

LENGTHS = [9, 0, 1, 14]


def run(leaves, layout, *, dense, rows=None):
    """Selection, attention and gradients of a loss with a weight of its own for every entry of a row."""
    rows = torch.arange(leaves.q.shape[0]) if rows is None else rows
    queries = layout.select_queries(rows)
    q, index_q = leaves.q[rows], leaves.index_q[rows]
    selection = block_select(index_q, leaves.index_k, queries, block_size=3, num_selected_blocks=2)
    index = {"index_q": index_q, "index_k": leaves.index_k, "kl_teacher": "per_head"}
    if dense:
        output = dense_kl(q, leaves.k, leaves.v, queries, **index)
    else:
        output = sparse_attention(q, leaves.k, leaves.v, selection.block_ids, queries, block_size=3, **index)
    out_weight = torch.arange(1.0, output.out[0].numel() + 1).view(output.out.shape[1:])
    ((output.out * out_weight).sum() + (output.kl * torch.tensor([2.0, 3.0])).sum()).backward()
    return selection, output, [leaf.grad for leaf in leaves]


both = pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])


@both
def test_documents_packed_equal_documents_apart(dense):
    inputs = random_inputs(sum(LENGTHS))
    selection, output, gradients = run(inputs.clones(), packed_layout(LENGTHS), dense=dense)
    start = 0
    for length in [length for length in LENGTHS if length]:
        part = slice(start, start + length)
        start += length
        apart = Inputs(*(tensor[part] for tensor in inputs)).clones()
        apart_selection, apart_output, apart_gradients = run(apart, packed_layout([length]), dense=dense)
        assert torch.equal(selection.block_ids[part], apart_selection.block_ids)
        torch.testing.assert_close(selection.index_lse[part], apart_selection.index_lse)
        torch.testing.assert_close([tensor[part] for tensor in output], list(apart_output))
        torch.testing.assert_close([gradient[part] for gradient in gradients], apart_gradients)


@both
def test_query_subsets_give_the_rows_and_together_the_gradients_of_the_full_call(dense):
    inputs = random_inputs(sum(LENGTHS))
    layout = packed_layout(LENGTHS)
    selection, output, gradients = run(inputs.clones(), layout, dense=dense)
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    total = [torch.zeros_like(gradient) for gradient in gradients]
    for rows in order.split([11, 1, 12]):
        part_selection, part_output, part_gradients = run(inputs.clones(), layout, dense=dense, rows=rows)
        assert torch.equal(part_selection.block_ids, selection.block_ids[rows])
        torch.testing.assert_close(part_selection.index_lse, selection.index_lse[rows])
        torch.testing.assert_close(list(part_output), [tensor[rows] for tensor in output])
        total = [sum_ + gradient for sum_, gradient in zip(total, part_gradients, strict=True)]
    torch.testing.assert_close(total, gradients)


@both
def test_chunked_equals_unchunked(dense, monkeypatch):
    inputs = random_inputs(sum(LENGTHS))
    layout = packed_layout(LENGTHS)
    whole = run(inputs.clones(), layout, dense=dense)
    for budget in (1, 5 * 4 * sum(LENGTHS) * 8):  # chunks of one query, and of about five
        monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", budget)
        cut = run(inputs.clones(), layout, dense=dense)
        assert torch.equal(cut[0].block_ids, whole[0].block_ids)
        torch.testing.assert_close(cut[0].index_lse, whole[0].index_lse)
        torch.testing.assert_close(cut[1], whole[1])
        torch.testing.assert_close(cut[2], whole[2])


def test_selection_quality_chunked_equals_unchunked(monkeypatch):
    inputs = random_inputs(sum(LENGTHS))
    layout = packed_layout(LENGTHS)
    index = {"index_q": inputs.index_q, "index_k": inputs.index_k}
    block_ids, _ = block_select(*inputs[3:], layout, block_size=3, num_selected_blocks=2)
    whole = selection_quality(inputs.q, inputs.k, block_ids, layout, block_size=3, **index)
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 1)
    torch.testing.assert_close(
        selection_quality(inputs.q, inputs.k, block_ids, layout, block_size=3, **index), whole
    )


@both
def test_with_several_chunks_the_graph_holds_no_scores(dense, monkeypatch):
    length = 64
    layout = packed_layout([length])
    leaves = random_inputs(length).clones()
    # The scores of all chunks would be heads * keys * queries numbers; any input has a few percent of that.
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4 * length * 8 * 8)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    block_ids, _ = block_select(*leaves[3:], layout, block_size=4, num_selected_blocks=3)
    index = {"index_q": leaves.index_q, "index_k": leaves.index_k}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if dense:
            output = dense_kl(*leaves[:3], layout, **index)
        else:
            output = sparse_attention(*leaves[:3], block_ids, layout, block_size=4, **index)
    assert sum(kept) < 4 * length * length / 2
    (output.out.sum() + output.kl.sum()).backward()
    assert all(leaf.grad is not None for leaf in leaves)


@both
def test_the_ops_work_inside_activation_recomputation(dense, monkeypatch):
    inputs = random_inputs(sum(LENGTHS))
    layout = packed_layout(LENGTHS)
    _, _, expected = run(inputs.clones(), layout, dense=dense)
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4000)
    for use_reentrant in (True, False):
        leaves = inputs.clones()

        def block(*tensors):
            leaves = Inputs(*tensors)
            block_ids, _ = block_select(*leaves[3:], layout, block_size=3, num_selected_blocks=2)
            index = {"index_q": leaves.index_q, "index_k": leaves.index_k}
            if dense:
                output = dense_kl(*leaves[:3], layout, **index)
            else:
                output = sparse_attention(*leaves[:3], block_ids, layout, block_size=3, **index)
            return output.out, output.kl

        out, kl = torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=use_reentrant)
        weight = torch.arange(1.0, out[0].numel() + 1).view(out.shape[1:])
        ((out * weight).sum() + (kl * torch.tensor([2.0, 3.0])).sum()).backward()
        torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


def test_two_runs_are_bitwise_equal():
    inputs = random_inputs(sum(LENGTHS), dtype=torch.float32)
    layout = packed_layout(LENGTHS)
    first = run(inputs.clones(), layout, dense=False)
    second = run(inputs.clones(), layout, dense=False)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
