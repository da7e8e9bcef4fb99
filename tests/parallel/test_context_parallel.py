"""Context-parallel ranks compute what one rank does, and exchange their keys as they say."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import launch
from tests.parallel.context_parallel_program import cases

# Sums of a few hundred fp64 terms in another order: about 1e-15 each, a few layers deep.
TOLERANCE = 1e-12


def found_by(processes: int, folder: Path) -> dict[str, Any]:
    """What the program found, over all cases: starting processes takes longer than the cases."""
    launch("tests/parallel/context_parallel_program.py", folder / "results.json", processes=processes)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by(2, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by(4, tmp_path_factory.mktemp("four_ranks"))


def assert_equal(errors: dict[str, float], case: str) -> None:
    assert {"losses", "kl"} <= errors.keys()
    assert ("block_ids" in errors) == case.startswith("sparse")
    assert errors.get("block_ids", 0.0) == 0.0
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("case", cases(2))
def test_two_ranks_change_no_block_no_loss_no_kl_and_no_gradient(two_ranks, case):
    assert_equal(two_ranks[case], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(4))
def test_four_ranks_and_tensor_parallelism_change_nothing_either(four_ranks, case):
    assert_equal(four_ranks[case], case)


@pytest.mark.parametrize(
    "claim",
    [
        "keys of all ranks arrive in global order",
        "gradients are the sums over all ranks",
        "16-bit gradients are summed in fp32",
        "a gradient that reaches the local keys elsewhere is added",
        "keys are on their way while other work is done",
        "gradients are on their way while other work is done",
        "the graph keeps no gathered keys",
        "the backward pass gathers each tensor once",
        "keys are on their way back ahead of the need",
        "a recomputed forward pass gathers again",
    ],
)
def test_the_key_exchange(two_ranks, claim):
    assert two_ranks["exchange"][claim] is True
