"""On a GPU, in bf16: the kernels against the reference, and the decode step as a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.paged_rows import E4M3
from megatron_msa.inference.step import DecodeStep
from tests.attention.tiny import tiny_config, tiny_model
from tests.inference.checks import MIXTURE, decoded_logits, random_sequences

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 64,
    "msa_indexer_head_dim": 64,
    "msa_block_size": 64,
    "init_method_std": 0.05,
    "bf16": True,
    "params_dtype": torch.bfloat16,
}
LENGTHS = [700, 1, 63, 64, 65, 400]
NEW = 10
ALL_BLOCKS = 16
"""As many as the longest sequence has: rounding cannot make the backends choose different ones."""
BF16 = 0.05
"""Of logits around 1, through two layers that round to 2^-9 at every step."""


def model_of(*, blocks: int = ALL_BLOCKS, backend: str = "auto", **changes: Any) -> GPTModel:
    torch.manual_seed(5)
    config = tiny_config(**SHAPE | {"msa_num_selected_blocks": blocks, "msa_backend": backend} | changes)
    return tiny_model(config, seq_length=1024).to(torch.bfloat16).eval()


def engine_of(model: GPTModel, **options: Any) -> InferenceEngine:
    return InferenceEngine(model, **{"max_tokens": 800, "max_sequences": 4, "prefill_chunk": 150} | options)


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", [{}, {"cache_dtype": E4M3, "index_key_dtype": E4M3}])
@pytest.mark.parametrize("attention", ["as trained", "dense"])
def test_the_kernels_give_what_the_reference_gives(attention, form, monkeypatch):
    model = model_of()
    sequences = random_sequences([length + NEW for length in LENGTHS])
    options = {"attention": attention, "cuda_graphs": False, **form}
    fast = decoded_logits(engine_of(model, **options), sequences, NEW, monkeypatch)
    model.config.msa_backend = "reference"
    slow = decoded_logits(engine_of(model, **options), sequences, NEW, monkeypatch)
    for actual, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(actual, expected, atol=BF16, rtol=BF16)


@pytest.mark.parametrize("experts", [{}, MIXTURE])
def test_a_graph_of_the_step_gives_what_the_step_gives(experts, monkeypatch):
    """Batches of other sizes, sequences that come and go, and the same graph again."""
    model = model_of(blocks=4, **experts)
    sequences = random_sequences([length + NEW for length in LENGTHS])
    eager = decoded_logits(engine_of(model, cuda_graphs=False), sequences, NEW, monkeypatch)
    engine = engine_of(model, cuda_graphs=True)
    for _ in range(2):
        found = decoded_logits(engine, sequences, NEW, monkeypatch)
        for actual, expected in zip(found, eager, strict=True):
            torch.testing.assert_close(actual, expected, atol=BF16, rtol=BF16)
    assert set(engine._steps) <= {1, 2, 4}


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_does_not_wait_for_the_host(graph):
    engine = engine_of(model_of(blocks=4), cuda_graphs=graph)
    engine.generate(random_sequences([5, 80]), max_new_tokens=3)  # compiles the kernels
    eager = DecodeStep(engine.model, engine._decode_batch(2, 13), as_graph=False)
    step = engine._steps[2] if graph else eager
    step.batch.load([1, 2], [70, 3], [[1, 2], [3]])
    torch.cuda.synchronize()
    with no_synchronization():
        for _ in range(5):
            step()
    assert step.batch.lengths.tolist() == [75, 8]


def test_scores_hardly_depend_on_the_chunks():
    model = model_of(blocks=ALL_BLOCKS)
    sequences = random_sequences(LENGTHS)
    whole = torch.cat(engine_of(model, prefill_chunk=2000).log_probabilities(sequences))
    cut = torch.cat(engine_of(model, prefill_chunk=77).log_probabilities(sequences))
    assert (whole - cut).abs().mean() < 0.01
    assert (whole - cut).abs().max() < 0.2
