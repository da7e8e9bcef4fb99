"""A converted checkpoint, written without any parallelism, loads at TP2, EP2 and PP2."""

import json

import pytest
import torch

from tests.checkpoint.hf_models import MODELS, VOCABULARY, save_model
from tests.helpers import launch

from megatron_msa.checkpoint.hf import to_megatron, verify  # isort: skip

pytestmark = pytest.mark.slow  # a minute; the mapping itself is tested without processes
FP32_NOISE = 2e-5
WITH_EXPERTS = [name for name in MODELS if name not in ("llama", "qwen3")]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The largest error of the logits per model and layout; one start of two processes for all."""
    folder = tmp_path_factory.mktemp("layouts")
    tokens = torch.randint(VOCABULARY, (1, 44), generator=torch.Generator().manual_seed(3))
    for name in MODELS:
        save_model(name, folder / name / "hf")
        to_megatron.convert(folder / name / "hf", folder / name / "megatron")
        expected = verify.hf_logits(folder / name / "hf", tokens)
        torch.save((tokens, expected), folder / name / "logits.pt")
    results = folder / "results.json"
    launch("tests/checkpoint/hf_layouts_program.py", results, folder, processes=2)
    return json.loads(results.read_text())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "TP2") for name in MODELS),
        *((name, "PP2") for name in MODELS),
        *((name, "EP2") for name in WITH_EXPERTS),
    ],
)
def test_two_ranks_compute_the_logits_of_transformers(
    errors: dict[str, dict[str, float]], name: str, layout: str
) -> None:
    assert 0 < errors[name][layout] < FP32_NOISE
