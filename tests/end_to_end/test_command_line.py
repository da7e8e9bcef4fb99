"""pretrain_msa.py as a program: the dry run, and what a user sees of a wrong setting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launching import REPOSITORY, Pretraining

FLAGS = ["--train-iters", "4", "--msa-schedule", "warmup@0,sparse@2"]


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own from the first import on."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "pretrain_msa.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def dry_run(pretrain: Pretraining) -> subprocess.CompletedProcess[str]:
    """The first of eight processes that never come: there is no process group to wait in."""
    world = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    return run_script(
        *pretrain.flags, *pretrain.data, *FLAGS, "--dry-run", "--global-batch-size", "16", **world
    )


def test_the_dry_run_prints_its_report_alone_and_needs_no_process_group(
    dry_run: subprocess.CompletedProcess[str],
) -> None:
    assert dry_run.returncode == 0, dry_run.stderr
    titles = re.findall(r"^\S.*$", dry_run.stdout, re.M)
    assert titles == ["MSA", "Backbone", "Parallel layout and batch", "Parameters", "Phases"]
    for line in (
        r"msa_block_size +16$",
        r"msa_indexer_head_dim +8$",  # resolved: that of the attention heads
        r"num_moe_experts +4$",
        r"data_parallel_size +8$",
        r"global_batch_size +16$",
        r"warmup +from +0 to +2 iterations$",
        r"sparse +from +2 to end of training iterations$",
    ):
        assert re.search(rf"^  {line}", dry_run.stdout, re.M), line


def test_the_installed_libraries_say_nothing_about_what_is_not_there(
    dry_run: subprocess.CompletedProcess[str],
) -> None:
    for message in ("Apex", "transformer-engine>", "SyntaxWarning", "CUDA runtime", "one_logger package"):
        assert message not in dry_run.stderr, message


def test_the_dry_runs_total_is_the_number_of_parameters_of_the_model(
    dry_run: subprocess.CompletedProcess[str], pretrain: Pretraining, tmp_path: Path
) -> None:
    run = pretrain(tmp_path, *FLAGS)
    built = re.search(r"number of parameters on .*: (\d+)$", run.stdout, re.M)
    total = re.search(r"^  total +([\d,]+) +([\d,]+)$", dry_run.stdout, re.M)
    assert built is not None
    assert total is not None
    assert int(total[1].replace(",", "")) == int(built[1])
    # Of four experts a token takes two, and it multiplies nothing by its row of the input embedding.
    experts, embedding = 4 * 3 * 32 * 16, 264 * 32
    assert int(total[2].replace(",", "")) == int(built[1]) - experts // 2 - embedding


def test_a_wrong_setting_ends_with_status_2_and_one_line_of_error(pretrain: Pretraining) -> None:
    result = run_script(*pretrain.flags, *pretrain.data, "--msa-schedule", "warmup@0,sparce@2")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "error: --msa-schedule 'warmup@0,sparce@2': unknown phase"
    )
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--msa-backend", "fast"], ["--hidden-size", "wide"]])
def test_a_flag_that_cannot_be_parsed_is_not_buried_under_the_usage(
    pretrain: Pretraining, tmp_path: Path, flags: list[str]
) -> None:
    run = pretrain(tmp_path, *FLAGS, *flags, expect_status=2)
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert flags[0] in line


def test_only_the_first_process_reports_the_error(pretrain: Pretraining, tmp_path: Path) -> None:
    flags = ["--train-iters", "4", "--msa-schedule", "warmup@0,sparse@4"]
    run = pretrain(tmp_path, *flags, processes=2, expect_status=2)
    assert run.stderr.count("error: --msa-schedule lets sparse start at 4") == 1


def test_evaluation_alone_needs_no_optimizer(pretrain: Pretraining, tmp_path: Path) -> None:
    flags = [*FLAGS, "--eval-iters", "2"]
    trained = pretrain(tmp_path, *flags, "--save", "checkpoints", "--save-interval", "4")
    evaluated = pretrain(tmp_path / "evaluation", *flags, "--load", "../checkpoints", "--skip-train")
    (during,) = [row for row in trained.rows if row["event"] == "validation"]
    (alone,) = [row for row in evaluated.rows if row["event"] == "validation"]
    assert alone == during  # the loss after step 4, in the sparse phase
