"""The whole engine on the Triton kernels, through Triton's interpreter, against the reference (fp16).

Prompts over two chunks and several blocks, decode over the end of a page, in 16 and in 8 bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_msa.checkpoint.hf.megatron_model import seed
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.paged_rows import E4M3
from tests.inference.checks import decoded_logits, model_of, random_sequences
from tests.kernels.triton_interpreter import INTERPRETED, needs_interpreter, run_tests_in_interpreter

pytestmark = pytest.mark.slow

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "msa_indexer_head_dim": 64,
    "msa_block_size": 64,
    "msa_layer_freq": "[1,0]",
    "msa_backend": "triton",
    "init_method_std": 0.05,
    "fp16": True,
    "params_dtype": torch.float16,
}


@needs_interpreter
def test_in_the_interpreter():
    run_tests_in_interpreter(str(Path(__file__)))


@pytest.mark.skipif(not INTERPRETED, reason="run by the test of the interpreter")
@pytest.mark.parametrize("form", [{}, {"cache_dtype": E4M3, "index_key_dtype": E4M3}])
def test_the_kernels_give_what_the_reference_gives(form, monkeypatch):
    seed(1)
    # As many blocks as there are: rounding cannot make the backends choose different ones.
    model = model_of(**SHAPE | {"msa_num_selected_blocks": 4}).to(torch.float16)
    sequences = random_sequences([length + 3 for length in (130, 1, 63)])
    found = {}
    for backend in ("triton", "reference"):
        model.config.msa_backend = backend
        engine = InferenceEngine(
            model, max_tokens=192, max_sequences=3, prefill_chunk=100, position_limit=192, **form
        )
        found[backend] = decoded_logits(engine, sequences, 3, monkeypatch)
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert actual.dtype == torch.float16
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
