"""Losses, KL and gradient norms do not depend on the size of the microbatches or on recomputation.

Every run starts from one checkpoint. From scratch they would differ: on a CPU Megatron's warm-up of fused
functions takes random numbers, as many as a microbatch needs, before the parameters are drawn.
"""

from collections.abc import Callable

import pytest

from tests.end_to_end.launching import Pretraining, Run
from tests.parallel.ten_steps import assert_same_flops

FLAGS = ["--train-iters", "6", "--msa-schedule", "dense@0,warmup@2,sparse@4", "--msa-quality-interval", "3"]
# With the default of 1e-8 Adam turns the rounding error of a gradient that is almost zero into a step of full
# size, and two steps later a query chooses another block.
FLAGS += ["--adam-eps", "1e-2"]
COMPARED = (3, 4, 5, 6)
# Sums over microbatches, ranks and rows in another order: a few times the rounding of fp32 (6e-8).
TOLERANCE = 1e-6

Continue = Callable[..., Run]


@pytest.fixture(scope="module")
def continued(pretrain: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Continue:
    """Runs steps 3 to 6 from one checkpoint, without its optimizer state: optimizers store it differently."""
    checkpoints: dict[str, str] = {}

    def run(*flags: str, processes: int = 1, model: str = "") -> Run:
        if model not in checkpoints:
            folder = tmp_path_factory.mktemp("start")
            save = ["--save", str(folder), "--save-interval", "2", "--exit-interval", "2"]
            pretrain(folder, *FLAGS, *model.split(), *save)
            checkpoints[model] = str(folder)
        load = ["--load", checkpoints[model], "--no-load-optim", "--no-load-rng"]
        folder = tmp_path_factory.mktemp("run")
        return pretrain(folder, *FLAGS, *model.split(), *load, *flags, processes=processes)

    return run


@pytest.fixture(scope="module")
def reference(continued: Continue) -> Run:
    """One process, four microbatches of one sequence."""
    run = continued()
    assert tuple(run.steps) == COMPARED
    assert {row["phase"] for row in run.steps.values()} == {"warmup", "sparse"}
    return run


def assert_same(run: Run, reference: Run) -> None:
    assert tuple(run.steps) == tuple(reference.steps), "a step is missing, or logged more than once"
    for step, expected in reference.steps.items():
        for name in ("lm_loss", "kl", "grad_norm"):
            assert run.steps[step][name] == pytest.approx(expected[name], rel=TOLERANCE), f"{name}, {step}"
        for layer, kl in expected["kl_per_layer"].items():
            assert run.steps[step]["kl_per_layer"][layer] == pytest.approx(kl, rel=TOLERANCE)
    assert_same_flops(run, reference)


PER_TOKEN = "--calculate-per-token-loss"


@pytest.mark.parametrize(
    ("micro_batch_size", "flags"),
    [("2", []), ("4", []), ("1", [PER_TOKEN]), ("2", [PER_TOKEN]), ("4", [PER_TOKEN])],
)
def test_the_size_of_the_microbatches_changes_nothing(
    continued: Continue, reference: Run, micro_batch_size: str, flags: list[str]
) -> None:
    assert_same(continued("--micro-batch-size", micro_batch_size, *flags), reference)


def test_microbatches_with_unequal_numbers_of_tokens_agree_when_the_mean_is_over_all_tokens(
    continued: Continue,
) -> None:
    flags = ["--eod-mask-loss", PER_TOKEN]
    assert_same(continued("--micro-batch-size", "4", *flags), continued(*flags))


@pytest.mark.parametrize(
    "flags",
    [
        ["--recompute-granularity", "selective"],
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
        ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"],
    ],
    ids=["selective", "full", "first-layer"],
)
def test_activation_recomputation_changes_nothing(
    continued: Continue, reference: Run, flags: list[str]
) -> None:
    run = continued(*flags)
    assert_same(run, reference)
    # The forward pass runs twice, but each selection is measured once.
    measured = {step for step, row in run.steps.items() if "block_recall" in row}
    assert measured == {3, 6}
    for step in measured:
        assert run.steps[step]["block_recall"] == pytest.approx(reference.steps[step]["block_recall"])


def test_layers_that_predict_further_tokens_follow_the_decoders_in_the_metrics(continued: Continue) -> None:
    model = "--mtp-num-layers 1"
    run = continued("--pipeline-model-parallel-size", "2", processes=2, model=model)
    assert_same(run, continued(model=model))
    for row in run.steps.values():
        assert set(row["kl_per_layer"]) == {"1", "2", "3"}
