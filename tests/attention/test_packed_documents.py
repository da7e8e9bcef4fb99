"""Documents packed into one sequence equal the same documents one by one, and so do batches."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_msa.attention.packing import document_layout, from_packed, to_packed
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    BLOCK,
    DEVICE,
    VOCABULARY,
    assert_same,
    gradients,
    kl_of,
    packed_documents,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
)

LENGTHS = [17, 30, 1, 23]
assert all(length % BLOCK for length in LENGTHS), "document boundaries lie inside blocks of the pack"

# Sums over rows, because means of documents of different lengths do not add up.
SUMS = {"calculate_per_token_loss": True}


def run(model, pieces) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """Losses of all tokens, gradients of their sum and of the KL, and the KL sums, over several forwards."""
    losses = []
    for tokens, labels, packed in pieces:
        losses.append(token_losses(model, tokens, labels, packed))
        losses[-1].sum().backward()
    return torch.cat([each.detach().flatten() for each in losses]), gradients(model), kl_of(model)


def assert_same_run(actual, expected, phase: Phase) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-11)
    if phase is Phase.DENSE:  # no gradient of the index branch to compare
        for found in (actual[1], expected[1]):
            for name in [name for name in found if ".index_branch." in name]:
                assert not found.pop(name).any()
    assert_same(actual[1], expected[1])
    for sums, expected_sums in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(sums, expected_sums, rtol=1e-11, atol=0)


@pytest.mark.parametrize("pattern", ["1", "[0,1]"], ids=["all MSA", "first layer full attention"])
@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.WARMUP, Phase.SPARSE])
def test_packed_documents_equal_the_documents_apart(phase, pattern):
    model = tiny_model(tiny_config(**SUMS, msa_layer_freq=pattern))
    set_phase(model, phase)
    tokens, labels = random_tokens(batch=1, sequence=sum(LENGTHS))
    apart = [
        (piece, label, None)
        for piece, label in zip(tokens.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    ]
    expected = run(model, apart)
    actual = run(model, [(tokens, labels, packed_documents(LENGTHS))])
    assert_same_run(actual, expected, phase)


@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.WARMUP, Phase.SPARSE])
def test_a_batch_of_two_equals_two_batches_of_one(phase):
    model = tiny_model(tiny_config(**SUMS))
    set_phase(model, phase)
    tokens, labels = random_tokens(batch=2)
    apart = [(tokens[i : i + 1], labels[i : i + 1], None) for i in range(2)]
    assert_same_run(run(model, [(tokens, labels, None)]), run(model, apart), phase)


def test_packing_matters_joined_documents_give_other_losses():
    model = tiny_model()
    tokens, labels = random_tokens(batch=1, sequence=sum(LENGTHS))
    joined = token_losses(model, tokens, labels)
    packed = token_losses(model, tokens, labels, packed_documents(LENGTHS))
    assert torch.allclose(joined[0, : LENGTHS[0]], packed[0, : LENGTHS[0]], rtol=0, atol=1e-11)
    assert ((joined - packed)[0, LENGTHS[0] + 2 :].abs() > 1e-6).all()


def test_recomputation_keeps_packed_documents_apart():
    tokens, labels = random_tokens(batch=1, sequence=sum(LENGTHS))
    plain = tiny_model()
    selective = tiny_model(tiny_config(recompute_granularity="selective", recompute_modules=["core_attn"]))
    selective.load_state_dict(plain.state_dict())
    pieces = [(tokens, labels, packed_documents(LENGTHS))]
    assert_same_run(run(selective, pieces), run(plain, pieces), Phase.SPARSE)


@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.WARMUP, Phase.SPARSE])
def test_padding_behind_documents_does_not_change_their_tokens(phase):
    """cu_seqlens_q_padded says where documents lie when cu_seqlens_q only says how long they are."""
    model = tiny_model()
    set_phase(model, phase)
    lengths, room = [5, 10], [8, 12]
    documents = [torch.randint(VOCABULARY, (length,), device=DEVICE) for length in lengths]
    tokens = torch.zeros(1, sum(room), dtype=torch.long, device=DEVICE)
    tokens[0, :5], tokens[0, 8:18] = documents
    packed = packed_documents(lengths)
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = packed_documents(room).cu_seqlens_q
    packed.max_seqlen_q = packed.max_seqlen_kv = max(room)
    losses = token_losses(model, tokens, tokens, packed)[0]
    apart = [token_losses(model, document[None], document[None])[0] for document in documents]
    torch.testing.assert_close(torch.cat([losses[:5], losses[8:18]]), torch.cat(apart), rtol=0, atol=1e-11)


def test_the_layout_is_built_once_per_microbatch_and_without_reading_the_device(monkeypatch):
    packed = packed_documents(LENGTHS)
    query = torch.zeros(sum(LENGTHS), 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__int__", lambda self: pytest.fail("a tensor was read on the host"))
        layout = document_layout(query, packed)
    assert document_layout(query, packed) is layout
    assert layout.query_position.tolist() == [i for length in LENGTHS for i in range(length)]
    assert layout.query_document.tolist() == [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    assert document_layout(query, packed_documents(LENGTHS)) is not layout


def test_a_layout_kept_from_inference_can_be_used_in_training():
    query = torch.zeros(29, 1, 4, 8)  # a shape that no other test uses: layouts are cached
    with torch.inference_mode():
        layout = document_layout(query, None)
    assert document_layout(query, None) is layout
    assert not layout.query_position.is_inference()


def test_params_of_an_unpacked_batch_describe_no_documents():
    query = torch.zeros(6, 2, 4, 8)
    layout = document_layout(query, PackedSeqParams(qkv_format="sbhd"))
    assert layout.query_position.tolist() == [*range(6), *range(6)]


def test_packing_a_batch_lays_its_sequences_end_to_end():
    x = torch.arange(3 * 2 * 4 * 5).view(3, 2, 4, 5)
    packed = to_packed(x)
    assert torch.equal(packed[:3], x[:, 0])
    assert torch.equal(packed[3:], x[:, 1])
    assert torch.equal(from_packed(packed, batch_size=2), x.flatten(2))
    assert to_packed(packed) is packed
    assert torch.equal(from_packed(packed, batch_size=None), packed.flatten(1))
