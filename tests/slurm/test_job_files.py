"""The SLURM job files without SLURM: what they refuse, what they would start, and how a job ends."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SLURM = REPOSITORY / "examples/slurm"
SITE = {"ACCOUNT": "lab", "PARTITION": "h100", "NODES": "64", "VENV": sys.prefix}
RECIPE = ["examples/msa_109b/pretrain.sh", "8k", "--data-path", "a folder/text"]


def run(file: str, *arguments: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    base = {"PATH": os.environ["PATH"], "SAVE": str(folder / "save"), "LOGS": str(folder / "logs"), "TE": "0"}
    return subprocess.run(
        [SLURM / file, *arguments],
        cwd=REPOSITORY,
        env=base | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["ACCOUNT", "PARTITION", "NODES", "VENV"])
def test_nothing_is_submitted_while_a_site_value_is_missing(name: str, tmp_path: Path) -> None:
    values = {key: value for key, value in SITE.items() if key != name}
    # An sbatch that would be found is one that must not be called.
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho called\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("pretrain.sbatch", *RECIPE, folder=tmp_path, **values | {"PATH": path})
    assert result.returncode == 2
    assert f"{name} is not set; fill it in in examples/slurm/site.sh" in result.stderr
    assert "called" not in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODES": "many"}, "NODES is 'many'; it must be a positive number"),
        ({"VENV": "/nowhere"}, "/nowhere/bin/python does not exist"),
        ({"GPUS_PER_NODE": "eight"}, "GPUS_PER_NODE is 'eight'; it must be a number"),
        ({"SAVE_SECONDS": "15m"}, "SAVE_SECONDS is '15m'; it must be a positive number"),
        ({"LOGS": "/data/my logs"}, "LOGS is '/data/my logs'; use one without spaces"),
    ],
)
def test_a_site_value_that_cannot_work_is_refused(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    result = run("pretrain.sbatch", *RECIPE, folder=tmp_path, **SITE | changes)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_recipe_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    result = run("pretrain.sbatch", "examples/msa_108b/pretrain.sh", folder=tmp_path, **SITE)
    assert result.returncode == 2
    assert "'examples/msa_108b/pretrain.sh' is no program; pass a recipe" in result.stderr


def test_a_dry_run_prints_the_submission_and_the_processes(tmp_path: Path) -> None:
    result = run("pretrain.sbatch", "--dry-run", *RECIPE, folder=tmp_path, **SITE)
    assert result.returncode == 0, result.stderr
    submission, recipe, processes = result.stdout.splitlines()
    words = shlex.split(submission)
    assert words[0] == "sbatch"
    assert {"--account=lab", "--partition=h100", "--nodes=64", "--ntasks-per-node=8", "--requeue"} <= {*words}
    assert "--signal=B:TERM@900" in words
    assert words[-4:] == RECIPE
    assert shlex.split(recipe)[-4:] == RECIPE
    assert processes.startswith("srun --label --kill-on-bad-exit=0 --wait=120 ")
    assert f"{sys.prefix}/bin/python {REPOSITORY}/pretrain_msa.py --num-layers 41" in processes
    assert not (tmp_path / "logs").exists()


def test_an_image_replaces_the_environment(tmp_path: Path) -> None:
    site = {key: value for key, value in SITE.items() if key != "VENV"}
    site |= {"IMAGE": "msa.sqsh", "MOUNTS": "/data:/data"}
    result = run("pretrain.sbatch", "--dry-run", *RECIPE, folder=tmp_path, **site)
    assert result.returncode == 0, result.stderr
    assert "--container-image=msa.sqsh --no-container-mount-home --container-mounts=/data:/data python " in (
        result.stdout
    )


def test_a_conversion_needs_its_dense_checkpoint(tmp_path: Path) -> None:
    result = run("convert.sbatch", "examples/msa_109b/convert.sh", folder=tmp_path, **SITE)
    assert result.returncode != 0
    assert "DENSE: folder of the dense checkpoints" in result.stderr


# -- how a job ends: the commands of SLURM are recorded, the job's own command is a shell -------------


@pytest.fixture
def job(tmp_path: Path):
    """Run a job's shell until it ends; returns its status and the commands of SLURM that it gave."""
    calls = tmp_path / "calls"
    for name in ("scontrol", "scancel", "squeue", "sleep"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        answer = {"squeue": 'cat "$STATE_FILE"', "scontrol": '[[ "$1" != show ]] || cat "$JOB_FILE"'}.get(
            name, ":"
        )
        script.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{answer}\n')
        script.chmod(0o755)
    state, description = tmp_path / "state", tmp_path / "description"

    def start(
        command: str,
        *,
        job_state: str = "RUNNING",
        attempt: int = 0,
        preempted: str = "None",
        **environment: str,
    ) -> tuple[int, list[str]]:
        calls.write_text("")
        state.write_text(job_state)
        description.write_text(f"   PreemptEligibleTime=2026-11-29T04:31:15 PreemptTime={preempted}\n")
        result = run(
            "pretrain.sbatch",
            *("bash", "-c", command),
            folder=tmp_path,
            **SITE,
            PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
            STATE_FILE=str(state),
            JOB_FILE=str(description),
            SLURM_JOB_ID="7",
            SLURM_RESTART_COUNT=str(attempt),
            MAX_RETRIES="2",
            **environment,
        )
        # Questions to SLURM change nothing.
        asked = [call for call in calls.read_text().splitlines() if not call.startswith("scontrol show")]
        return result.returncode, asked

    return start


# $PPID is the job's shell.
TERM_BY_SLURM = "kill -TERM $PPID; /bin/sleep 1; "


def test_a_finished_job_ends_with_status_0(job) -> None:
    assert job("exit 0") == (0, [])


def test_after_a_signal_and_a_save_the_job_is_put_back(job) -> None:
    status, calls = job(TERM_BY_SLURM + "exit 0")
    assert status == 0
    assert calls[0] == "scancel --signal=TERM 7"  # passed on to the processes
    assert "scontrol requeue 7" in calls


def test_a_program_that_the_signal_ended_has_not_failed(job) -> None:
    for attempt in range(5):
        status, calls = job(TERM_BY_SLURM + "exit 143", attempt=attempt)
        assert (status, "scontrol requeue 7" in calls) == (0, True)
    assert job("exit 143", attempt=2)[0] == 143  # without a signal to the job it has


@pytest.mark.parametrize("status", [0, 143])
def test_a_preempted_job_is_put_back_though_only_its_processes_were_told(job, status: int) -> None:
    ended, calls = job(f"exit {status}", preempted="2026-11-29T04:32:54")
    assert (ended, "scontrol requeue 7" in calls) == (0, True)


def test_an_element_of_an_array_speaks_of_itself_only(job) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls = job(TERM_BY_SLURM + "exit 143", **element)
    assert [call.split()[-1] for call in calls if "scancel" in call or "requeue" in call] == ["5_3", "5_3"]
    assert "squeue --noheader --jobs=5_3 --format=%T" in calls


def test_a_cancelled_job_stays_cancelled(job) -> None:
    _, calls = job(TERM_BY_SLURM + "exit 0", job_state="COMPLETING")
    assert not any(call.startswith("scontrol") for call in calls)


def test_a_failure_is_tried_again_so_often_and_its_status_is_kept(job) -> None:
    for attempt in range(2):
        status, calls = job("exit 3", attempt=attempt)
        assert (status, "scontrol requeue 7" in calls) == (3, True)
    status, calls = job("exit 3", attempt=2)
    assert (status, "scontrol requeue 7" in calls) == (3, False)


def test_a_new_checkpoint_starts_the_count_of_failures_anew(job, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    for attempt in range(5):
        (tmp_path / "save/latest_checkpointed_iteration.txt").write_text(str(100 * attempt))
        _, calls = job("exit 1", attempt=attempt)
        assert "scontrol requeue 7" in calls


def test_the_status_is_that_of_the_process_that_ended_first(job) -> None:
    report = "srun: error: n[2-3]: tasks 8-9: Exited with exit code 2\nsrun: error: n1: task 0: Terminated"
    assert job(f"echo '{report}' >&2; exit 143") == (2, [])


def test_a_refused_setting_is_not_tried_again(job) -> None:
    assert job("exit 2") == (2, [])


def test_a_nan_that_came_again_is_tried_once_more_elsewhere(job, tmp_path: Path) -> None:
    pointer = tmp_path / "save/latest_checkpointed_iteration.txt"
    status, calls = job(f"echo 4 > {pointer}; exit 16", attempt=0)
    assert (status, "scontrol requeue 7" in calls) == (16, True)
    assert job("exit 17", attempt=1) == (17, [])


def test_a_nan_that_did_not_come_again_is_a_failure_like_others(job) -> None:
    for attempt in range(2):
        status, calls = job("exit 17", attempt=attempt)
        assert (status, "scontrol requeue 7" in calls) == (17, True)
    status, calls = job("exit 17", attempt=2)
    assert (status, "scontrol requeue 7" in calls) == (17, False)


def test_a_process_that_fails_while_it_stops_is_a_failure(job) -> None:
    status, calls = job(TERM_BY_SLURM + "exit 9")
    assert status == 9
    assert "scontrol requeue 7" in calls
