"""The phases of an MSA layer: what they compute, and which parameters their losses reach."""

import pytest
import torch

from megatron_msa.attention import self_attention
from megatron_msa.phases import Phase
from tests.attention.tiny import (
    ALL_BLOCKS,
    assert_same,
    assert_zero,
    backbone_gradients,
    gradients,
    index_gradients,
    is_index,
    kl_of,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
    with_weights_of,
)

WITH_KL = [Phase.INDEX_ONLY, Phase.WARMUP, Phase.SPARSE]


@pytest.fixture
def no_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("block_select was called")

    monkeypatch.setattr(self_attention, "block_select", refuse)


@pytest.mark.parametrize("phase", WITH_KL)
def test_with_all_blocks_selected_every_phase_equals_dense(phase):
    model = tiny_model(tiny_config(msa_num_selected_blocks=ALL_BLOCKS))
    batch = random_tokens()
    losses, expected = {}, {}
    for each in (Phase.DENSE, phase):
        set_phase(model, each)
        losses[each] = token_losses(model, *batch)
        losses[each].mean().backward()
        expected[each] = backbone_gradients(model)
    torch.testing.assert_close(losses[phase], losses[Phase.DENSE], rtol=0, atol=1e-11)
    assert_same(expected[phase], expected[Phase.DENSE])


def test_with_few_blocks_sparse_differs_from_dense():
    model = tiny_model()
    batch = random_tokens()
    set_phase(model, Phase.DENSE)
    dense = token_losses(model, *batch)
    set_phase(model, Phase.SPARSE)
    sparse = token_losses(model, *batch)
    visible_to_all = 3 * 4  # tokens that see no more blocks than are selected
    torch.testing.assert_close(sparse[:, :visible_to_all], dense[:, :visible_to_all], rtol=0, atol=1e-11)
    assert ((sparse - dense)[:, visible_to_all:].abs() > 1e-4).float().mean() > 0.9


def test_warmup_and_dense_do_not_depend_on_the_number_of_blocks():
    few = tiny_model()
    many = with_weights_of(few, tiny_config(msa_num_selected_blocks=ALL_BLOCKS))
    batch = random_tokens()
    for phase in (Phase.DENSE, Phase.WARMUP):
        set_phase(few, phase)
        set_phase(many, phase)
        assert torch.equal(token_losses(few, *batch), token_losses(many, *batch))


@pytest.mark.usefixtures("no_selection")
def test_dense_gives_the_index_branch_zero_gradients_and_selects_nothing():
    model = tiny_model()
    set_phase(model, Phase.DENSE)
    token_losses(model, *random_tokens()).mean().backward()
    assert_zero(index_gradients(model))  # which also asserts that they are not None
    assert kl_of(model) == [None, None]


@pytest.mark.parametrize("phase", WITH_KL)
def test_the_kl_trains_the_index_branch_only(phase):
    model = tiny_model()
    set_phase(model, phase)
    (token_losses(model, *random_tokens()).mean() * 0).backward()
    found = gradients(model)
    assert_zero({name: value for name, value in found.items() if not is_index(name)})
    assert all(value.abs().max() > 0 for name, value in found.items() if is_index(name))


@pytest.mark.parametrize("phase", WITH_KL)
def test_the_language_model_loss_never_trains_the_index_branch(phase):
    model = tiny_model(tiny_config(msa_loss_coeff=0.0))
    set_phase(model, phase)
    token_losses(model, *random_tokens()).mean().backward()
    found = gradients(model)
    assert_zero({name: value for name, value in found.items() if is_index(name)})
    assert all(value.abs().max() > 0 for name, value in found.items() if not is_index(name))
    assert all(sums[0] > 0 for sums in kl_of(model)), "the KL is still measured"


@pytest.mark.parametrize("phase", [Phase.DENSE, *WITH_KL])
def test_the_kl_does_not_change_the_backbone_gradients(phase):
    strong = tiny_model(tiny_config(msa_loss_coeff=100.0))
    without = with_weights_of(strong, tiny_config(msa_loss_coeff=0.0))
    batch = random_tokens()
    found = []
    for model in (strong, without):
        set_phase(model, phase)
        token_losses(model, *batch).mean().backward()
        found.append(backbone_gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("phase", [Phase.DENSE, *WITH_KL])
def test_evaluation_computes_the_same_losses_and_records_nothing(phase):
    model = tiny_model()
    set_phase(model, phase)
    batch = random_tokens()
    trained = token_losses(model, *batch).detach()
    kl_of(model)
    with torch.no_grad():
        in_training_mode = token_losses(model, *batch)
    model.eval()
    with torch.no_grad():
        without_gradients = token_losses(model, *batch)
    with_gradients = token_losses(model, *batch)
    for losses in (in_training_mode, without_gradients, with_gradients.detach()):
        torch.testing.assert_close(losses, trained, rtol=0, atol=1e-12)
    with_gradients.mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if is_index(name))
    assert kl_of(model) == [None, None]


@pytest.mark.parametrize("phase", list(Phase))
def test_a_bf16_model_trains_like_the_fp64_one(phase):
    exact = tiny_model(tiny_config(msa_num_selected_blocks=ALL_BLOCKS))  # rounding may not change a selection
    rounded = with_weights_of(exact, exact.config).bfloat16()
    exact.load_state_dict(rounded.state_dict())  # the same weights
    batch = random_tokens()
    found = []
    for model in (exact, rounded):
        set_phase(model, phase)
        losses = token_losses(model, *batch)
        losses.float().mean().backward()
        found.append((losses.double().mean(), kl_of(model), gradients(model)))
    (loss, kl, _), (rounded_loss, rounded_kl, rounded_gradients) = found
    assert all(value.dtype == torch.bfloat16 for value in rounded_gradients.values())
    # A rounding to bf16 changes a number by 2^-9 of it at most; averages over all tokens lose less than four.
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=2**-7)
    for sums, expected in zip(rounded_kl, kl, strict=True):
        assert (sums is None) == (expected is None) == (phase is Phase.DENSE)
        if sums is not None:
            assert sums.dtype == torch.float64
            assert sums[0].item() == pytest.approx(expected[0].item(), rel=2**-7)


def test_a_model_starts_in_the_first_phase_of_its_schedule():
    model = tiny_model(tiny_config(msa_schedule="dense@0,warmup@5,sparse@9"))
    assert {module.phase for module in model.modules() if hasattr(module, "phase")} == {Phase.DENSE}


def test_what_the_layer_cannot_do_is_refused_by_name():
    layer = tiny_model().decoder.layers[0].self_attention
    hidden = torch.zeros(4, 1, 32, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="has no index keys"):
        layer(hidden, None, inference_context=object())
    with pytest.raises(NotImplementedError, match="attention bias"):
        layer(hidden, None, attention_bias=hidden)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_single_context_parallel_rank_exchanges_nothing(phase, monkeypatch):
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name, **__: pytest.fail(name))
    model = tiny_model(tiny_config(msa_layer_freq="[0,1]"))
    set_phase(model, phase)
    token_losses(model, *random_tokens()).mean().backward()
