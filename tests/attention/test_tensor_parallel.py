"""Two tensor-parallel ranks compute what one does: losses, KL, gradients of backbone and index branch."""

import json
from typing import Any

import pytest

from tests.attention.tensor_parallel_program import CASES
from tests.attention.tiny import is_index
from tests.helpers import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found, over all cases: starting two processes takes longer than all of them."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    (folder / "checkpoint").mkdir()
    launch(
        "tests/attention/tensor_parallel_program.py",
        folder / "results.json",
        folder / "checkpoint",
        processes=2,
    )
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("layout", ["plain", "sequence parallel"])
@pytest.mark.parametrize("case", CASES)
def test_tensor_parallelism_changes_no_loss_no_kl_and_no_gradient(results, case, layout):
    errors = results[case][layout]
    assert {"losses", "kl"} <= errors.keys()
    assert sum(map(is_index, errors)) == (4 if "no q and k norm" in case else 8)
    assert {name: error for name, error in errors.items() if error > 1e-10} == {}


def test_a_checkpoint_of_one_rank_loads_into_two(results):
    errors = results["reloaded"]
    assert sum(map(is_index, errors)) == 8
    assert set(errors.values()) == {0.0}


def test_replicated_parameters_start_equal_on_every_rank(results):
    differences = results["initial differences"]
    assert sum(map(is_index, differences)) == 6  # of two layers: the key projection and both norms
    assert set(differences.values()) == {0.0}
