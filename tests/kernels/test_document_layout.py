import pytest
import torch
from msa_kernels import DocumentLayout
from msa_kernels.common.blocks import KeyBlocks


def test_a_dense_batch_is_packed_batch_major():
    layout = DocumentLayout.dense_batch(2, 3, device="cpu")
    assert layout.document_offsets.tolist() == [0, 3, 6]
    assert layout.query_document.tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.query_position.tolist() == [0, 1, 2, 0, 1, 2]
    assert (layout.max_document_length, layout.num_documents, layout.num_queries) == (3, 2, 6)
    assert all(
        tensor.dtype == torch.int32
        for tensor in (layout.document_offsets, layout.query_document, layout.query_position)
    )


def test_empty_documents_own_no_key():
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 0, 2, 2, 2, 5, 5]))
    assert layout.query_document.tolist() == [1, 1, 4, 4, 4]
    assert layout.query_position.tolist() == [0, 1, 0, 1, 2]
    assert layout.max_document_length == 3
    assert layout.num_documents == 6


def test_documents_that_are_all_empty_make_a_layout_without_queries():
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 0]))
    assert (layout.num_queries, layout.max_document_length, layout.max_blocks(4)) == (0, 0, 0)


def test_given_bounds_are_taken_as_they_are():
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 2, 5]), max_document_length=8, num_keys=5)
    assert layout.max_document_length == 8
    assert layout.num_queries == 5
    assert layout.max_blocks(3) == 3


def test_selected_queries_keep_their_document_and_position():
    layout = DocumentLayout.dense_batch(2, 3, device="cpu").select_queries(torch.tensor([5, 0, 4]))
    assert layout.query_document.tolist() == [1, 0, 1]
    assert layout.query_position.tolist() == [2, 0, 1]
    assert layout.document_offsets.tolist() == [0, 3, 6]


def test_a_query_sees_its_document_up_to_itself():
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 2, 2, 5])).select_queries(
        torch.tensor([3, 1])
    )
    assert layout.visible_keys(5).int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_keys_know_their_document_and_position():
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 2, 2, 5]))
    assert layout.key_document(5).tolist() == [0, 0, 2, 2, 2]
    assert layout.key_position(5).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_key_blocks_hold_every_key_once_in_blocks_of_its_document(block_size):
    layout = DocumentLayout.from_document_offsets(torch.tensor([0, 0, 5, 6, 6, 13, 13]))
    blocks = KeyBlocks.build(layout, 13, block_size)
    filled = blocks.document >= 0
    assert blocks.key[filled].tolist() == list(range(13))
    assert blocks.document[filled].tolist() == layout.query_document.tolist()
    assert blocks.position[filled].tolist() == layout.query_position.tolist()
    number = torch.arange(blocks.key.shape[0])[:, None] - blocks.first_block[blocks.document.clamp(min=0)]
    assert torch.equal(number[filled], blocks.position[filled] // block_size)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"query_document": torch.tensor([0, 0])},
            TypeError,
            "query_document must be an int32 tensor, got torch.int64",
        ),
        ({"document_offsets": [0, 2]}, TypeError, "document_offsets must be an int32 tensor, got list"),
        (
            {"query_position": torch.zeros(1, 2, dtype=torch.int32)},
            ValueError,
            "query_position must have one dim",
        ),
        (
            {"query_position": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "has 2 entries but query_position has 3",
        ),
        ({"query_position": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "is on meta but"),
        ({"document_offsets": torch.zeros(0, dtype=torch.int32)}, ValueError, "document_offsets is empty"),
        ({"max_document_length": torch.tensor(2)}, TypeError, "must be an int on the host, got Tensor"),
        ({"max_document_length": -1}, ValueError, "must be 0 or more tokens, got -1"),
    ],
)
def test_a_malformed_layout_is_refused(change, error, message):
    right = {
        "document_offsets": torch.tensor([0, 2], dtype=torch.int32),
        "query_document": torch.zeros(2, dtype=torch.int32),
        "query_position": torch.arange(2, dtype=torch.int32),
        "max_document_length": 2,
    }
    DocumentLayout(**right)
    with pytest.raises(error, match=message):
        DocumentLayout(**(right | change))


def test_a_dense_batch_without_tokens_is_refused():
    with pytest.raises(ValueError, match="must be 1 or more, got 2 and 0"):
        DocumentLayout.dense_batch(2, 0, device="cpu")
