"""A run saved in one layout, optimizer state included, continues in another with the same numbers."""

from pathlib import Path

import pytest

from tests.end_to_end.launching import Pretraining
from tests.parallel.ten_steps import FLAGS, TenSteps

RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
SAVED = 5
# As between layouts that do not stop in between (see test_layouts).
TOLERANCE = 1e-6
LAYOUTS = {
    "DP2": "",
    "PP2": "--pipeline-model-parallel-size 2",
    "CP2": "--context-parallel-size 2",
    "EP2": "--expert-model-parallel-size 2",
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel",
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("CP2", "PP2"),
        pytest.param("PP2", "DP2", marks=pytest.mark.slow),
        pytest.param("DP2", "CP2", marks=pytest.mark.slow),
        pytest.param("TP2", "EP2", marks=pytest.mark.slow),
        pytest.param("EP2", "TP2", marks=pytest.mark.slow),
        pytest.param("EP2", "DP2", marks=pytest.mark.slow),
        pytest.param("DP2", "EP2", marks=pytest.mark.slow),
        pytest.param("PP2", "TP2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_continues_in_another_layout(
    before: str,
    after: str,
    pretrain: Pretraining,
    initial_checkpoint: Path,
    single: TenSteps,
    tmp_path: Path,
) -> None:
    save = ["--save", str(tmp_path), "--save-interval", str(SAVED), "--exit-interval", str(SAVED)]
    first = [*LAYOUTS[before].split(), "--load", str(initial_checkpoint), "--finetune", *save]
    pretrain(tmp_path, *FLAGS, *RESHARDABLE, *first, processes=2)
    # Generators are saved per rank; nothing here draws from them.
    second = [*LAYOUTS[after].split(), "--load", str(tmp_path), "--no-load-rng"]
    run = pretrain(tmp_path, *FLAGS, *RESHARDABLE, *second, processes=2)

    assert list(run.steps) == list(range(1, 11)), "the resumed run repeated or left out steps"
    for step, expected in single.run.steps.items():
        for name in ("lm_loss", "grad_norm"):
            assert run.steps[step][name] == pytest.approx(expected[name], rel=TOLERANCE), (step, name)
        kl = expected.get("kl_per_layer", {})
        assert run.steps[step].get("kl_per_layer", {}) == pytest.approx(kl, rel=TOLERANCE), step
