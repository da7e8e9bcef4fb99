"""A run that is saved and resumed continues as if nothing had happened, to the last bit."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.end_to_end.launching import Pretraining, wait_for

BF16 = ["--bf16", "--use-distributed-optimizer"]
SAVED, END = 4, 8


def tensor_names(checkpoint: Path) -> set[str]:
    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


@pytest.mark.parametrize(
    ("schedule", "flags"),
    [
        pytest.param("warmup@0,sparse@5", [], id="fp32"),
        pytest.param("warmup@0,sparse@5", BF16, id="bf16-distributed"),
        pytest.param("warmup@0,sparse@5", ["--msa-indexer-lr", "1e-2"], id="fp32-index-lr"),
        pytest.param(
            "warmup@0,sparse@5",
            ["--msa-indexer-lr", "3e-3"],
            id="fp32-index-lr-equal-to-lr",
            marks=pytest.mark.slow,
        ),
        pytest.param("warmup@0,sparse@2560tok", [*BF16, "--msa-indexer-lr", "1e-2"], id="bf16-tokens"),
        # Saved while the index branch (backbone) has not been trained yet; both have been frozen afterwards.
        pytest.param(
            "dense@0,index_only@5,sparse@7", [], id="fp32-frozen-index-branch", marks=pytest.mark.slow
        ),
        pytest.param("dense@0,index_only@5,sparse@7", BF16, id="bf16-frozen-index-branch"),
        pytest.param("index_only@0,dense@5,sparse@7", [], id="fp32-frozen-backbone"),
        pytest.param(
            "index_only@0,dense@5,sparse@7", BF16, id="bf16-frozen-backbone", marks=pytest.mark.slow
        ),
    ],
)
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(
    pretrain: Pretraining, tmp_path: Path, schedule: str, flags: list[str]
) -> None:
    flags = ["--train-iters", str(END), "--msa-schedule", schedule, *flags]
    uninterrupted = pretrain(tmp_path / "uninterrupted", *flags)
    save = ["--save", "checkpoints", "--save-interval", str(SAVED)]
    pretrain(tmp_path, *flags, *save, "--exit-interval", str(SAVED))
    resumed = pretrain(tmp_path, *flags, *save, "--load", "checkpoints")

    assert list(resumed.steps) == list(range(1, END + 1)), "the resumed run repeated or left out steps"
    for step in range(1, END + 1):
        one, other = uninterrupted.steps[step], resumed.steps[step]
        for name in ("lm_loss", "kl", "grad_norm", "phase", "learning_rate", "tokens"):
            assert one.get(name) == other.get(name), f"{name} of step {step}"
    assert uninterrupted.steps[END]["kl"] > 0
    starts = [row for row in resumed.rows if row["event"] == "phase" and row["previous"] is None]
    assert [row["iteration"] for row in starts] == [0, SAVED]


def test_a_checkpoint_holds_the_index_branch_of_every_msa_layer(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = ["--train-iters", "1", "--msa-schedule", "dense@0", "--msa-layer-freq", "[0,1]"]
    pretrain(tmp_path, *flags, "--save", "checkpoints", "--save-interval", "1")

    names = {name for name in tensor_names(tmp_path / "checkpoints/iter_0000001") if "index_branch" in name}
    names = {name for name in names if name.endswith(".weight")}  # leaves out Megatron's "extra states"
    prefix = "decoder.layers.1.self_attention.index_branch."
    parts = ["linear_index_q", "linear_index_k", "index_q_layernorm", "index_k_norm"]
    parameters = {f"{prefix}{part}.weight" for part in parts}
    moments = {f"optimizer.state.{moment}.{p}" for p in parameters for moment in ("exp_avg", "exp_avg_sq")}
    assert names == parameters | moments


def test_the_architecture_can_come_from_the_checkpoint(pretrain: Pretraining, tmp_path: Path) -> None:
    flags = ["--msa-schedule", "warmup@0", "--save", "checkpoints", "--save-interval", "1"]
    pretrain(tmp_path, *flags, "--train-iters", "1")
    wrong = ["--num-query-groups", "4", "--rotary-percent", "1.0"]
    flags += ["--train-iters", "2", "--override-opt-param-scheduler", "--load", "checkpoints", *wrong]
    pretrain(tmp_path, *flags, expect_status=1)  # the shapes differ
    pretrain(tmp_path, *flags, "--use-checkpoint-args")


def test_a_termination_signal_saves_and_the_run_continues_from_there(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = ["--msa-schedule", "warmup@0,sparse@2", "--save", "checkpoints", "--save-interval", "100000"]
    long = [*flags, "--train-iters", "100000", "--exit-signal-handler"]
    processes = pretrain.start(tmp_path, *long)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"step"') >= 3, "the third step")
    processes[0].terminate()
    run = pretrain.finish(processes, tmp_path)

    assert run.status == 0
    last = max(run.steps)
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(last)
    resumed = pretrain(tmp_path, *long, "--load", "checkpoints", "--exit-interval", str(last + 2))
    assert list(resumed.steps) == list(range(1, last + 3))
    assert resumed.steps[last + 1]["phase"] == "sparse"


def test_a_process_that_dies_while_saving_leaves_the_checkpoint_before_it_in_charge(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = ["--train-iters", "6", "--msa-schedule", "warmup@0,sparse@3"]
    flags += ["--save", "checkpoints", "--save-interval", "2"]
    unfinished = tmp_path / "checkpoints/iter_0000004"
    died = pretrain(
        tmp_path,
        *flags,
        environment={"DIE_BEFORE_RENAMING_TO": f"checkpoints/{unfinished.name}/.metadata"},
        expect_status=-9,
    )

    assert max(died.steps) == 4
    assert unfinished.is_dir()
    assert not (unfinished / ".metadata").exists()
    tracker = tmp_path / "checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"

    # The next process finds its way, and writes over what the dead one left.
    resumed = pretrain(tmp_path, *flags, "--load", "checkpoints")
    assert max(resumed.steps) == 6
    assert tracker.read_text() == "6"
    assert (unfinished / ".metadata").exists()
