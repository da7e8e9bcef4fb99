"""Prefill in any chunking and decode token by token give the logits of the full forward pass (fp64, CPU)."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.step import all_experts, rows_for_every_expert
from megatron_msa.phases import Phase
from tests.attention.tiny import BLOCK, VOCABULARY, set_phase
from tests.inference.checks import (
    LENGTHS,
    MIXTURE,
    NEW,
    decoded_logits,
    full_log_probabilities,
    full_logits,
    model_of,
    random_sequences,
)

EXACT = 1e-10
"""fp64 in both; another order of additions is all that differs."""
ROUTED = 1e-6
"""Megatron computes the router's probabilities in fp32: a difference in fp64's last place grows to its."""
ROUNDED = 2e-6
"""Log-probabilities of up to 10 nats in fp32."""
VARIANTS = {
    "sparse": {},
    "full attention between": {"num_layers": 3, "msa_layer_freq": "[1,0,1]"},
    "no MSA layer": {"msa_layer_freq": "[0,0]"},
    "warmup phase": {"msa_schedule": "warmup@0"},
    "dense phase": {"msa_schedule": "dense@0"},
    "experts with biases": MIXTURE,
    "gated attention": {"attention_output_gate": True},
    "norm over all heads": {"msa_full_width_qk_norm": True},
    "some layers without rotary embedding": {"no_rope_freq": [0, 1]},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "one group, other scale": {"num_query_groups": 1, "softmax_scale": 0.2},
}


def engine_of(model, **options):
    return InferenceEngine(model, **{"max_tokens": 64, "max_sequences": 3, "prefill_chunk": 16} | options)


@pytest.mark.parametrize("chunk", [1, 5, 16, 500])
def test_any_chunking_scores_as_the_full_forward_pass(chunk):
    """Chunks of one token, across page ends, with several sequences; and all sequences in one."""
    model = model_of(num_layers=3, msa_layer_freq="[1,0,1]")
    sequences = random_sequences(LENGTHS)
    found = engine_of(model, prefill_chunk=chunk, max_sequences=4).log_probabilities(sequences)
    for sequence, actual in zip(sequences, found, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual, full_log_probabilities(model, sequence).float(), atol=ROUNDED, rtol=0
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_give_the_logits_of_the_full_forward_pass(variant, monkeypatch):
    model = model_of(**VARIANTS[variant])
    sequences = random_sequences([length + NEW for length in LENGTHS])
    found = decoded_logits(engine_of(model), sequences, NEW, monkeypatch)
    for sequence, actual in zip(sequences, found, strict=True):
        expected = full_logits(model, sequence[:-1])[-NEW:]
        tolerance = ROUTED if variant == "experts with biases" else EXACT
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_the_sparse_and_the_dense_control_differ_and_are_what_they_say(monkeypatch):
    """The same weights: "dense" is full attention whatever the phase, "sparse" selects whatever the phase."""
    model = model_of()
    sequences = random_sequences([41 + NEW])
    found = {}
    for attention, phase in (("dense", Phase.WARMUP), ("sparse", Phase.SPARSE)):
        set_phase(model, phase)
        expected = full_logits(model, sequences[0][:-1])[-NEW:]
        set_phase(model, Phase.SPARSE if attention == "dense" else Phase.WARMUP)
        (found[attention],) = decoded_logits(
            engine_of(model, attention=attention), sequences, NEW, monkeypatch
        )
        torch.testing.assert_close(found[attention], expected, atol=EXACT, rtol=EXACT)
    assert (found["dense"] - found["sparse"]).abs().max() > 0.1


def test_greedy_generation_chooses_what_the_full_forward_pass_would():
    model = model_of()
    prompts = random_sequences([30, 1, 8])
    for prompt, new in zip(prompts, engine_of(model).generate(prompts, max_new_tokens=NEW), strict=True):
        expected = list(prompt)
        for _ in range(NEW):
            expected.append(int(full_logits(model, expected)[-1].argmax()))
        assert new == expected[len(prompt) :]


def test_sequences_that_wait_for_pages_get_the_same_tokens():
    """Pages of others before them, in another order than the tokens; a batch that shrinks and grows."""
    model = model_of()
    prompts = random_sequences([30, 1, 12, 25, 7, 20])
    alone = [engine_of(model).generate([prompt], max_new_tokens=NEW)[0] for prompt in prompts]
    tight = engine_of(model, cache_tokens=60, max_sequences=5)
    assert tight.generate(prompts, max_new_tokens=NEW) == alone
    assert tight.generate(prompts[::-1], max_new_tokens=NEW) == alone[::-1]


def test_a_sequence_ends_behind_its_stop_token_and_the_others_go_on():
    model = model_of()
    prompts = random_sequences([9, 14, 5])
    free = engine_of(model).generate(prompts, max_new_tokens=NEW)
    stop = {free[1][3]}
    for whole, new in zip(
        free, engine_of(model).generate(prompts, max_new_tokens=NEW, stop=stop), strict=True
    ):
        places = [place for place, token in enumerate(whole) if token in stop]
        assert new == whole[: places[0] + 1 if places else NEW]


def test_scores_from_a_later_start():
    model = model_of()
    sequences = random_sequences([30, 12, 12, 1])
    starts = [25, 0, 12, 0]
    found = engine_of(model, prefill_chunk=7).log_probabilities(sequences, start=starts)
    whole = engine_of(model).log_probabilities(sequences)
    for start, some, every in zip(starts, found, whole, strict=True):
        torch.testing.assert_close(some, every[max(start, 1) - 1 :])
    assert [each.numel() for each in found] == [5, 11, 0, 0]


def test_every_expert_on_every_row_changes_no_logits(monkeypatch):
    """What a CUDA graph of the decode step does with a mixture of experts; prefill afterwards is intact."""
    model = model_of(**MIXTURE)
    sequences = random_sequences([length + NEW for length in (12, 5, 30)])
    expected = decoded_logits(engine_of(model), sequences, NEW, monkeypatch)
    engine = engine_of(model)
    step_for = engine._step_for

    def padded(running):
        step = step_for(running)
        run = step._run

        def run_padded():
            with all_experts(model):
                assert model.decoder.layers[1].mlp.token_dispatcher.drop_and_pad
                return run()

        monkeypatch.setattr(step, "_run", run_padded)
        return step

    monkeypatch.setattr(engine, "_step_for", padded)
    for _ in range(2):
        found = decoded_logits(engine, sequences, NEW, monkeypatch)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=ROUTED, rtol=ROUTED)
    dispatcher = model.decoder.layers[1].mlp.token_dispatcher
    assert not dispatcher.drop_and_pad  # it would only be slow
    assert model.config.moe_expert_capacity_factor is None


def test_every_expert_has_room_for_exactly_all_rows():
    for experts in (4, 6, 10, 60, 128):
        for topk in range(1, 9):
            factor = rows_for_every_expert(experts, topk)
            found = [get_capacity(tokens * topk, experts, factor) for tokens in range(1, 257)]
            assert found == list(range(1, 257)), (experts, topk)


def test_layers_that_predict_further_tokens_are_left_out():
    model = model_of(mtp_num_layers=1)
    (sequence,) = random_sequences([30])
    (found,) = engine_of(model).log_probabilities([sequence])
    plain = model_of()
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith("mtp.")})
    torch.testing.assert_close(found, full_log_probabilities(plain, sequence).float(), atol=ROUNDED, rtol=0)


def test_the_model_stays_as_it_was(monkeypatch):
    """Phases, training mode and the training forward pass; a failed call takes no slot with it."""
    model = model_of().train()
    (sequence,) = random_sequences([20])
    before = full_logits(model, sequence)
    engine = engine_of(model, max_sequences=1)
    first = engine.generate([sequence], max_new_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_load_decode", lambda running: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([sequence], max_new_tokens=3)
    assert engine.generate([sequence], max_new_tokens=3) == first
    assert model.training
    assert {layer.phase for layer in msa_layers(model)} == {Phase.SPARSE}
    assert torch.equal(full_logits(model, sequence), before)


def test_the_cache_is_allocated_once_and_as_large_as_it_says():
    model = model_of(num_layers=3, msa_layer_freq="[1,0,1]")
    engine = engine_of(model, max_tokens=62, max_sequences=2)
    tensors = [
        rows.data
        for layer in engine._cache.layers
        for rows in (layer.key, layer.value, layer.index_key)
        if rows is not None
    ]
    pages = 2 * 16 + 1  # 62 tokens in pages of 4, and the scratch page
    # Three layers of 2 groups x 8 numbers for keys and values; two of 12 for index keys; 8 bytes each.
    assert engine.bytes_per_token == 3 * 2 * 2 * 8 * 8 + 2 * 12 * 8
    assert engine.cache_bytes == pages * BLOCK * engine.bytes_per_token
    assert sum(x.nbytes for x in tensors) == engine.cache_bytes
    addresses = [x.data_ptr() for x in tensors]
    engine.generate(random_sequences([50, 3, 20]), max_new_tokens=NEW)
    again = [
        rows.data.data_ptr()
        for layer in engine._cache.layers
        for rows in (layer.key, layer.value, layer.index_key)
        if rows is not None
    ]
    assert again == addresses
    assert engine_of(model, attention="dense").bytes_per_token == 3 * 2 * 2 * 8 * 8


def test_speed_counts_what_was_done():
    engine = engine_of(model_of())
    engine.generate(random_sequences([10, 4]), max_new_tokens=5)
    assert (engine.speed.prefill_tokens, engine.speed.decode_tokens) == (14, 8)
    assert engine.speed.prefill_seconds > 0
    assert engine.speed.decode_seconds > 0


def test_ids_that_only_pad_the_embedding_are_never_chosen():
    model = model_of()
    with torch.no_grad():
        model.output_layer.weight[VOCABULARY - 4 :] *= 50  # by themselves they would win about always
    (prompt,) = random_sequences([12])
    assert max(engine_of(model).generate([prompt], max_new_tokens=20)[0]) >= VOCABULARY - 4
    capped = engine_of(model, vocab_size=VOCABULARY - 4).generate(
        [[min(t, VOCABULARY - 5) for t in prompt]], max_new_tokens=20
    )
    assert max(capped[0]) < VOCABULARY - 4
