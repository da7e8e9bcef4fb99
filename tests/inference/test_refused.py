"""What an engine refuses, with a message that says what to change."""

from types import SimpleNamespace

import pytest
import torch

from megatron_msa.checkpoint.hf.megatron_model import seed
from megatron_msa.errors import ConfigError
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.paged_rows import E4M3
from tests.attention.tiny import VOCABULARY
from tests.inference.checks import MIXTURE, model_of, random_sequences


@pytest.fixture(scope="module")
def model(process_groups):
    seed()
    return model_of()


def engine_of(model, **options):
    return InferenceEngine(model, **{"max_tokens": 32} | options)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty; give at least one token"),
        ([[1, VOCABULARY]], 4, "token 1 of prompt 0 is 64; the model knows 0 to 63"),
        ([[-1]], 4, "token 0 of prompt 0 is -1"),
        (
            [[1] * 30],
            3,
            "prompt 0 has 30 tokens and 3 more are asked for, but the cache holds 32 per sequence",
        ),
        (
            [[1] * 60],
            5,
            "but the model was trained for positions up to 64 .*position_limit .--position-limit",
        ),
        ([[1]], 0, r"max_new_tokens \(--max-new-tokens\) is 0; it must be 1 or more"),
    ],
)
def test_prompts(model, prompts, new, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(model).generate(prompts, max_new_tokens=new)


@pytest.mark.parametrize(
    ("sequences", "start", "message"),
    [
        ([[]], None, "sequence 0 is empty"),
        ([[1, 99]], None, "token 1 of sequence 0 is 99"),
        ([[1] * 33], None, "sequence 0 has 33 tokens, but the cache holds 32"),
        ([[1], [2]], [1], "start has 1 entries for 2 sequences"),
    ],
)
def test_sequences(model, sequences, start, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(model).log_probabilities(sequences, start=start)


def test_ids_beyond_the_tokenizer(model):
    with pytest.raises(
        ConfigError, match=r"token 0 of prompt 0 is 60; the model knows 0 to 59\. Use the tokenizer"
    ):
        engine_of(model, vocab_size=60).generate([[60]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"max_sequences": 0}, r"max_sequences \(--max-sequences\) is 0"),
        ({"prefill_chunk": 0}, r"prefill_chunk \(--prefill-chunk\) is 0"),
        ({"cache_tokens": 0}, "cache_tokens is 0"),
        ({"attention": "full"}, "attention is 'full'; allowed: 'as trained', 'dense', 'sparse'"),
        ({"cache_dtype": torch.int8}, "cache_dtype is torch.int8; allowed: None .* torch.float8_e4m3fn"),
        ({"index_key_dtype": torch.bfloat16}, "index_key_dtype is torch.bfloat16"),
    ],
)
def test_options(model, options, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(model, **options)


def test_positions_that_were_not_learned(process_groups):
    model = model_of(position_embedding_type="learned_absolute")
    engine_of(model, position_limit=64)
    with pytest.raises(
        ConfigError, match=r"position_limit \(--position-limit\) is 65, but the model has learned 64"
    ):
        engine_of(model, position_limit=65)


def test_placeholders_of_images(model, monkeypatch):
    monkeypatch.setattr(model, "vision", SimpleNamespace(placeholder_ids=(7,)), raising=False)
    with pytest.raises(ConfigError, match="token 1 of prompt 0 is 7, the placeholder of an image or video"):
        engine_of(model).generate([[1, 7]], max_new_tokens=1)


def test_selection_without_an_index_branch(process_groups):
    with pytest.raises(ConfigError, match="the model has no MSA layer; use 'as trained' or 'dense'"):
        engine_of(model_of(msa_layer_freq="[0,0]"), attention="sparse")


def test_experts_that_drop_tokens(process_groups):
    with pytest.raises(
        ConfigError, match=r"--moe-expert-capacity-factor is 1.0: .*moe_expert_capacity_factor=None"
    ):
        engine_of(model_of(**MIXTURE, moe_expert_capacity_factor=1.0))


def test_a_cache_beyond_its_limit_names_the_figures(model):
    """Two layers of 2 groups x 8 numbers for keys and for values, 12 for index keys, 8 bytes each: 704."""
    limit = 17 * 4 * 704
    engine_of(model, max_tokens=64, memory_limit=limit)
    with pytest.raises(
        ConfigError, match=r"64 tokens at 704 bytes each takes 0.00 GiB, and the given limit is"
    ):
        engine_of(model, max_tokens=64, memory_limit=limit - 1)
    with pytest.raises(ConfigError, match=r"90% of the free memory is .* GiB: use fewer sequences \(--max"):
        engine_of(model, max_tokens=2**40)
    engine_of(model, max_tokens=64, memory_limit=limit // 2, cache_dtype=E4M3)


def test_a_longer_position_limit_is_a_choice(model):
    """Beyond what the embedding was made for the rotary angles go on."""
    (sequence,) = random_sequences([80])
    found = InferenceEngine(model, max_tokens=100, position_limit=100).log_probabilities([sequence])
    assert found[0].numel() == 79
