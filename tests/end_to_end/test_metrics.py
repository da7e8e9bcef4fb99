"""What a run says about itself: metrics file, console, TensorBoard, W&B."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.launching import Pretraining, Run

ALWAYS = {
    *("event", "iteration", "phase", "tokens", "learning_rate", "grad_norm", "loss_scale", "skipped"),
    *("seconds", "lm_loss", "tokens_per_second", "tflops_executed", "tflops_dense_equivalent", "mfu"),
}
KL = {"kl", "kl_per_layer"}
QUALITY = {"block_recall", "score_recall", "selection_entropy", "local_block_share", "first_block_share"}
SAMPLED = QUALITY | {f"{name}_per_layer" for name in QUALITY}

FLAGS = ["--train-iters", "8", "--msa-schedule", "dense@0,warmup@2,sparse@5"]
FLAGS += ["--msa-quality-interval", "3", "--eval-interval", "4", "--eval-iters", "1", "--split", "80,10,10"]
TENSORBOARD = ["--tensorboard-dir", "tensorboard", "--log-throughput", "--log-timers-to-tensorboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def run(pretrain: Pretraining, folder: Path) -> Run:
    """Eight steps through three phases with every kind of log."""
    wandb = ["--wandb-project", "tiny", "--wandb-exp-name", "test", "--wandb-save-dir", "wandb-files"]
    return pretrain(folder, *FLAGS, *TENSORBOARD, *wandb)


@pytest.fixture(scope="module")
def every_second_step(pretrain: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, logged in short lines and half as often."""
    folder = tmp_path_factory.mktemp("compact")
    return pretrain(folder, *FLAGS, "--log-line", "compact", "--log-interval", "2")


def test_every_step_has_one_row_with_the_documented_keys(run: Run) -> None:
    assert list(run.steps) == list(range(1, 9))
    for step, row in run.steps.items():
        expected = ALWAYS | (KL if step > 2 else set()) | (SAMPLED if step in (3, 6) else set())
        assert set(row) == expected, f"step {step}"
        assert row["tokens"] == step * 4 * 128
        assert row["tokens_per_second"] == pytest.approx(4 * 128 / row["seconds"])
        assert row["mfu"] is None  # the peak of this machine is unknown


def test_the_kl_is_the_sum_over_the_layers(run: Run) -> None:
    for row in run.steps.values():
        if "kl" in row:
            assert set(row["kl_per_layer"]) == {"1", "2"}
            assert row["kl"] == pytest.approx(sum(row["kl_per_layer"].values()))


def test_phases_begin_with_a_row_and_are_named_in_the_steps(run: Run) -> None:
    switches = [(r["iteration"], r["phase"], r["previous"]) for r in run.rows if r["event"] == "phase"]
    assert switches == [(0, "dense", None), (2, "warmup", "dense"), (5, "sparse", "warmup")]
    phases = [row["phase"] for row in run.steps.values()]
    assert phases == ["dense"] * 2 + ["warmup"] * 3 + ["sparse"] * 3


def test_executed_flops_follow_the_phase(run: Run) -> None:
    ratios: dict[str, set[float]] = {"dense": set(), "warmup": set(), "sparse": set()}
    for row in run.steps.values():
        ratios[row["phase"]].add(row["tflops_executed"] / row["tflops_dense_equivalent"])
    assert ratios["dense"] == {1.0}
    assert 1 < max(ratios["sparse"]) < min(ratios["warmup"])  # the documents are short: little is saved


def test_flops_are_those_of_the_training_steps_alone(
    run: Run, folder: Path, pretrain: Pretraining, tmp_path: Path
) -> None:
    """Documents seen in an evaluation must not count, neither for our figure nor for Megatron's own."""
    trained_only = pretrain(tmp_path, *FLAGS, *TENSORBOARD, "--eval-iters", "0")
    megatrons, megatrons_trained_only = tensorboard_flops(folder), tensorboard_flops(tmp_path)
    for step in run.steps:
        ours = [r.steps[step]["tflops_executed"] * r.steps[step]["seconds"] for r in (run, trained_only)]
        assert ours[0] == pytest.approx(ours[1], rel=1e-9)
    assert megatrons == pytest.approx(megatrons_trained_only, rel=1e-5)
    # Each step has other documents: were their lengths not passed on, Megatron's figure would not change.
    assert len({round(flops * 1e9) for step, flops in megatrons.items()}) > 4


def tensorboard_flops(folder: Path) -> dict[int, float]:
    """Megatron's own figure of each step, in 1e12."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    seconds = {event.step: event.value for event in events.Scalars("iteration-time")}
    throughput = {event.step: event.value for event in events.Scalars("throughput")}
    return {step: throughput[step] * seconds[step] for step in seconds}  # all but the first step


def test_validations_and_tests_have_rows_with_their_loss_and_phase(run: Run) -> None:
    rows = [row for row in run.rows if row["event"] in ("validation", "test")]
    # Megatron evaluates every fourth iteration and once more on both sets after training.
    events = [(row["event"], row["iteration"], row["phase"]) for row in rows]
    at_the_end = [("validation", 8, "sparse")] * 2 + [("test", 8, "sparse")]
    assert events == [("validation", 4, "warmup"), *at_the_end]
    assert all(3 < row["lm_loss"] < 6 for row in rows)


def test_a_row_of_several_steps_is_their_mean(run: Run, every_second_step: Run) -> None:
    assert list(every_second_step.steps) == [2, 4, 6, 8]
    for step, row in every_second_step.steps.items():
        pair = [run.steps[step - 1], run.steps[step]]
        assert row["lm_loss"] == pytest.approx(sum(r["lm_loss"] for r in pair) / 2, rel=1e-6)
        if "kl" in pair[0]:
            assert row["kl"] == pytest.approx(sum(r["kl"] for r in pair) / 2, rel=1e-6)
        assert row["grad_norm"] == pair[1]["grad_norm"]
        sampled = [r["score_recall"] for r in pair if "score_recall" in r]
        assert row.get("score_recall") == (pytest.approx(sampled[0]) if sampled else None)


def test_megatrons_console_line_has_the_kl_and_the_recall(run: Run) -> None:
    lines = re.findall(r"iteration +(\d+)/ +8 \|.* kl: (\S+) \|", run.stdout)
    assert [int(step) for step, _ in lines] == [3, 4, 5, 6, 7, 8]
    for step, kl in lines:
        assert float(kl) == pytest.approx(run.steps[int(step)]["kl"], rel=1e-5)
    recalls = re.findall(r"iteration +(\d+)/ .*score recall: \S+ \| block recall: ", run.stdout)
    assert recalls == ["3", "6"]


def test_the_compact_console_line_replaces_megatrons(every_second_step: Run) -> None:
    lines = re.findall(r"^step (\d)/8 (\S+) +\| loss +(\S+) \| kl +(\S+) +\|", every_second_step.stdout, re.M)
    assert [line[:2] for line in lines] == [("2", "dense"), ("4", "warmup"), ("6", "sparse"), ("8", "sparse")]
    for step, _, loss, kl in lines:
        row = every_second_step.steps[int(step)]
        assert float(loss) == pytest.approx(row["lm_loss"], abs=1e-4)
        assert kl == "-" or float(kl) == pytest.approx(row["kl"], abs=1e-4)
    assert lines[0][3] == "-"
    assert "elapsed time per iteration" not in every_second_step.stdout
    assert "validation at step 4: loss" in every_second_step.stdout


def test_tensorboard_has_the_kl_of_every_step_and_layer(run: Run, folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"msa/kl", "msa/kl_layer_1", "msa/kl_layer_2", "msa/score_recall"} <= set(events.Tags()["scalars"])
    logged = {event.step: event.value for event in events.Scalars("msa/kl")}
    assert logged == {s: pytest.approx(r["kl"], rel=1e-6) for s, r in run.steps.items() if "kl" in r}


def test_wandb_keeps_a_run_offline(run: Run, folder: Path) -> None:
    (offline,) = (folder / "wandb-files/wandb").glob("offline-run-*")
    (data,) = offline.glob("*.wandb")
    assert b"msa/kl_layer_2" in data.read_bytes()
