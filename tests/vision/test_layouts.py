"""Every layout computes what a single rank computes: loss and all gradients, in fp32."""

import json
from typing import Any

import pytest

from tests.helpers import launch
from tests.vision.layouts_program import CASES

FP32_NOISE = 3e-5
"""Of a gradient, relative to the tensor's largest entry: 7.4e-6 measured (TP2+SP, a batch of text). Sums are
taken in another order."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found, over all cases: starting two processes takes longer than all of them."""
    file = tmp_path_factory.mktemp("vision") / "results.json"
    launch("tests/vision/layouts_program.py", file, processes=2)
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_layout_repeats_the_single_rank(results: dict[str, Any], case: str) -> None:
    found = {name: errors for name, errors in results[case].items() if name != "patches encoded"}
    assert {"loss", "tokens"} <= found.keys()
    assert sum(name.startswith("vision_model.") for name in found) == 35
    # A rank without the parameter has no error of it. NaN is no number below the bound, and none is dropped.
    measured = {name: [each for each in errors if each is not None] for name, errors in found.items()}
    assert all(measured.values())
    wrong = {name: errors for name, errors in measured.items() if not all(e <= FP32_NOISE for e in errors)}
    assert wrong == {}


@pytest.mark.parametrize(
    ("case", "patches"),
    {
        "TP2+SP": [72, 72],  # together, each with its part of the heads and columns
        "PP2": [72, 0],
        "PP2, the encoder alone": [72, 0],
        "CP2": [40, 32],
        "CP2, two sequences": [40, 32],
        "CP2, one image": [40, 24],  # 24 and 24 of the first, then one rank has nothing to encode
        "CP2, full recomputation": [24, 24],
        "EP2": [48, 24],  # each its own microbatch
        "DP2, one rank has text": [48, 0],
    }.items(),
)
def test_no_rank_encodes_everything(results: dict[str, Any], case: str, patches: list[int]) -> None:
    """Of 72 patches in two microbatches, 48 in the first (64 with one image); segments are dealt whole."""
    assert results[case]["patches encoded"] == patches
