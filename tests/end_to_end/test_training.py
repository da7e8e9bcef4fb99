"""Training trains: the language model where the backbone is free, the index branch where it is."""

from pathlib import Path

from tests.end_to_end.launching import Pretraining

FLAGS = ["--train-iters", "30", "--lr-decay-style", "constant", "--lr", "1e-2"]


def test_the_index_branch_learns_to_follow_a_frozen_backbone(pretrain: Pretraining, tmp_path: Path) -> None:
    kl = pretrain(tmp_path, *FLAGS, "--msa-schedule", "index_only@0").values("kl", "lm_loss")
    assert kl[30][0] < 0.7 * kl[1][0]
    # The loss changes with the text alone; trained it would fall by a third (the next test).
    assert abs(kl[30][1] - kl[1][1]) < 0.1


def test_the_language_model_learns_while_the_index_branch_follows(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    run = pretrain(tmp_path, *FLAGS, "--msa-schedule", "warmup@0,sparse@15")
    assert run.steps[30]["lm_loss"] < 0.7 * run.steps[1]["lm_loss"]


def test_without_its_loss_the_index_branch_stays_behind(pretrain: Pretraining, tmp_path: Path) -> None:
    flags = [*FLAGS, "--msa-schedule", "index_only@0", "--msa-loss-coeff", "0", "--weight-decay", "0"]
    kl = pretrain(tmp_path, *flags).values("kl")
    assert abs(kl[30][0] - kl[1][0]) < 0.1 * kl[1][0]


def test_overlapped_communication_waits_for_no_idle_index_branch(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = ["--train-iters", "5", "--lr-decay-style", "constant", "--bf16", "--use-distributed-optimizer"]
    flags += ["--msa-schedule", "dense@0,warmup@2,sparse@4"]
    plain = pretrain(tmp_path / "plain", *flags)
    # Buckets so small that some hold nothing but parameters of the index branch.
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "500"]
    overlapped = pretrain(tmp_path / "overlapped", *flags, *overlap)
    assert overlapped.values("lm_loss", "grad_norm") == plain.values("lm_loss", "grad_norm")
