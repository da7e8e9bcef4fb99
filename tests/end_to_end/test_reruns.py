"""Steps that Megatron's rerun machine runs again, because a result looked wrong: what comes of the run.

The wrong results are injected by the machine itself; the spike is a loss compared with too low a bound.
"""

from pathlib import Path

import pytest

from megatron_msa.checkpoint.newest import newest_complete
from tests.end_to_end.launching import BACKGROUND, Pretraining, Run

pytestmark = pytest.mark.slow

FLAGS = ["--lr-decay-style", "constant", "--msa-schedule", "warmup@0,sparse@3", "--train-iters", "6"]
FLAGS += ["--bf16", "--use-distributed-optimizer", "--dataloader-inter-document-masking"]
SAVING = ["--save", "checkpoints", "--load", "checkpoints", "--save-interval", "2"]
SPEED = {"seconds", "tokens_per_second", "tflops_executed", "tflops_dense_equivalent"}
RESUME_ELSEWHERE, NOT_THE_DATA_OR_CONFIRMED = 16, 17


def inject(kind: str) -> list[str]:
    """An error in the second step: the first one is never checked."""
    return ["--error-injection-rate", "1", "--error-injection-type", kind]


def pairs_per_token(run: Run) -> dict[int, float]:
    return {i: row["tflops_executed"] / row["tokens_per_second"] for i, row in run.steps.items()}


def test_a_spike_is_run_again_and_the_run_goes_on_as_if_it_had_not_been(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    # 4 losses a step; the bound is known after 100. Experts are balanced by a bias, which a pass moves.
    flags = [*FLAGS, "--train-iters", "28", "--check-for-spiky-loss"]
    assert "--moe-router-enable-expert-bias" in pretrain.flags
    plain = pretrain(tmp_path / "plain", *flags)
    assert "Spiky loss" not in plain.stdout
    spiky = pretrain(tmp_path / "spiky", *flags, environment={"SPIKY_LOSS_FACTOR": "0.01"})
    # Iterations count from one more where the machine prints them.
    assert "at iteration #28 invocation #1 (message='Spiky loss')" in spiky.stdout
    assert spiky.stdout.count("unexpected result is reproducible within the tolerance") == 2
    for step, row in plain.steps.items():
        other = spiky.steps[step]
        assert {k: v for k, v in row.items() if k not in SPEED} == {
            k: v for k, v in other.items() if k not in SPEED
        }
    assert pairs_per_token(spiky) == pytest.approx(pairs_per_token(plain), rel=1e-9)


def test_an_error_that_does_not_come_again_ends_the_run_which_resumes(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    first = pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND, "--exit-interval", "2")
    processes = pretrain.start(tmp_path, *FLAGS, *SAVING, *BACKGROUND, *inject("transient_error"))
    run = pretrain.finish(processes, tmp_path)
    assert run.status == NOT_THE_DATA_OR_CONFIRMED
    assert "Possible transient error!" in run.stdout
    assert newest_complete(tmp_path / "checkpoints") == (2, [])
    resumed = pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND)
    assert list(resumed.steps) == [1, 2, 3, 4, 5, 6]
    assert first.steps[2] == resumed.steps[2]


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("persistent_error", "Possible persistent error!"), ("correct_result", "Correct result")],
)
def test_an_error_that_comes_again_is_run_a_third_time_on_another_node(
    pretrain: Pretraining, tmp_path: Path, kind: str, verdict: str
) -> None:
    flags = [*FLAGS, *SAVING, *BACKGROUND]

    def attempt(node: str, *more: str) -> Run:
        processes = pretrain.start(tmp_path, *flags, *more, environment={"PRETENDED_NODE": node})
        return pretrain.finish(processes, tmp_path)

    first = attempt("n1", *inject(kind))
    assert first.status == RESUME_ELSEWHERE
    assert "Need to rerun on a different GPU" in first.stdout
    saved = newest_complete(tmp_path / "checkpoints")
    assert saved == (1, [])  # before the step
    again = attempt("n1")
    assert again.status == RESUME_ELSEWHERE
    assert "Got rescheduled on the same GPU" in again.stdout
    elsewhere = attempt("n2")
    assert elsewhere.status == NOT_THE_DATA_OR_CONFIRMED
    assert verdict in elsewhere.stdout
    assert newest_complete(tmp_path / "checkpoints") == saved
