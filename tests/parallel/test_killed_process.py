"""A process that is killed ends the whole job, with a message; the job continues from its last checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.launching import REPOSITORY, Pretraining, Run, wait_for

END, SAVED = 8, 4
# One length for all runs, which a checkpoint remembers; --exit-interval ends those that are to end.
FLAGS = ["--train-iters", "100000", "--lr-decay-style", "constant", "--msa-schedule", "warmup@0,sparse@3"]
FLAGS += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--save", "checkpoints"]
SECONDS_TO_NOTICE = 60.0  # gloo: at once; the rest is for a busy machine


@pytest.fixture(scope="module")
def uninterrupted(pretrain: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(tmp_path_factory.mktemp("whole"), *FLAGS, *stop_at(END), processes=2)


def stop_at(iteration: int) -> list[str]:
    """Save there and end."""
    return ["--save-interval", str(iteration), "--exit-interval", str(iteration)]


def steps_logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"event": "step"') if metrics.exists() else 0


def living_members(process_group: int) -> list[int]:
    """Processes of a group that still run (and are not only waiting to be collected)."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == process_group and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def assert_explained(stderr: str, last_checkpoint: int) -> None:
    (line,) = re.findall(r"^error: rank 0 lost another process.*$", stderr, re.M)
    assert re.search(r"after \d+ iterations", line)
    assert "Restart with --load checkpoints" in line
    assert f"that of iteration {last_checkpoint}." in line


def assert_continues(pretrain: Pretraining, folder: Path, uninterrupted: Run) -> None:
    (folder / "metrics.jsonl").unlink()
    resumed = pretrain(folder, *FLAGS, *stop_at(END), "--load", "checkpoints", processes=2)
    assert list(resumed.steps) == list(range(SAVED + 1, END + 1))
    for step, row in resumed.steps.items():
        for name in ("lm_loss", "kl", "grad_norm", "phase"):
            assert row[name] == uninterrupted.steps[step][name], f"{name} of step {step}"


def test_the_others_end_with_a_message_and_the_job_continues_from_its_checkpoint(
    pretrain: Pretraining, tmp_path: Path, uninterrupted: Run
) -> None:
    pretrain(tmp_path, *FLAGS, *stop_at(SAVED), processes=2)
    endless = [*FLAGS, "--save-interval", "100000", "--load", "checkpoints"]
    processes = pretrain.start(tmp_path, *endless, processes=2)
    wait_for(lambda: steps_logged(tmp_path) >= SAVED + 2, "two more steps")
    os.kill(processes[1].pid, signal.SIGKILL)
    wait_for(lambda: not living_members(processes[0].pid), "the end of rank 0", SECONDS_TO_NOTICE)
    wait_for(lambda: not living_members(processes[1].pid), "the end of rank 1's children", 5.0)

    statuses = [pretrain.server.wait(process) for process in processes]
    assert statuses == [1, -signal.SIGKILL]
    assert_explained(processes[0].stderr, last_checkpoint=SAVED)
    assert_continues(pretrain, tmp_path, uninterrupted)


def test_a_process_killed_while_saving_leaves_the_last_checkpoint_in_charge(
    pretrain: Pretraining, tmp_path: Path, uninterrupted: Run
) -> None:
    """The process that completes the second checkpoint dies before it has; all have written their tensors."""
    flags = [*FLAGS, "--save-interval", str(SAVED // 2)]
    unfinished = f"checkpoints/iter_{SAVED + SAVED // 2:07d}"
    die = {"DIE_BEFORE_RENAMING_TO": f"{unfinished}/.metadata"}
    processes = pretrain.start(tmp_path, *flags, processes=2, environment=die)
    # No check of status first: that collects the processes with all they left behind.
    wait_for(lambda: not any(living_members(p.pid) for p in processes), "the end of the job")
    statuses = [pretrain.server.wait(process) for process in processes]
    assert statuses == [-signal.SIGKILL, 1]
    assert (tmp_path / unfinished).is_dir()
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(SAVED)
    assert f"that of iteration {SAVED}." in processes[1].stderr
    assert_continues(pretrain, tmp_path, uninterrupted)


def test_a_silent_process_is_given_up_after_the_configured_time(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--save-interval", "100000"]
    patience = ["--distributed-timeout-seconds-after-init", "5"]
    processes = pretrain.start(tmp_path, *flags, *patience, processes=2)
    wait_for(lambda: steps_logged(tmp_path) >= 2, "two steps")
    os.kill(processes[1].pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        wait_for(lambda: not living_members(processes[0].pid), "the end of rank 0", 60.0)
    finally:
        os.kill(processes[1].pid, signal.SIGKILL)
    assert time.monotonic() - start >= 4.0
    assert [pretrain.server.wait(process) for process in processes] == [1, -signal.SIGKILL]
    assert "error: rank 0 lost another process" in processes[0].stderr


@pytest.mark.slow  # two more processes import Megatron
def test_torchrun_ends_the_job_with_a_status_and_leaves_no_process(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--save-interval", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(REPOSITORY / "pretrain_msa.py"), *pretrain.flags, *pretrain.data, *flags]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*command, "--metrics-file", str(tmp_path / "metrics.jsonl")],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: steps_logged(tmp_path) >= 3 or job.poll() is not None, "three steps", 200.0)
        assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
        family = descendants(job.pid)
        workers = [pid for pid in family if "pretrain_msa.py" in command_line(pid)]
        os.kill(workers[-1], signal.SIGKILL)
        assert job.wait(SECONDS_TO_NOTICE) == 1
    finally:
        job.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "the end of all", 10.0)
    assert "SIGKILL" in (tmp_path / "log").read_text()


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [each for child in children for each in (child, *descendants(child))]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
