"""Tensor-, context- and expert-parallel ranks give the log-probabilities and tokens of a single rank."""

import json
from typing import Any

import pytest

from tests.helpers import launch
from tests.inference.parallel_program import CASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, over all cases."""
    folder = tmp_path_factory.mktemp("parallel")
    program = "tests/inference/parallel_program.py"
    launch(program, folder / "results.json", folder, processes=2, timeout=500)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_layout_changes_no_log_probability_and_no_token(results, case, rank):
    found = results[rank][case]
    assert found["log-probabilities"] < 2e-6  # of up to 10 nats, in fp32
    assert found["greedy"]
    assert found["drawn"]
