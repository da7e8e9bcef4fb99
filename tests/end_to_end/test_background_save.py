"""`--async-save`: the same checkpoints, and what is left when a process ends in mid-save."""

import os
import signal
from pathlib import Path

import pytest

from megatron_msa.checkpoint.newest import newest_complete
from tests.end_to_end.launching import BACKGROUND, Pretraining, Process, wait_for

pytestmark = pytest.mark.slow

FLAGS = [
    "--msa-schedule",
    "warmup@0,sparse@3",
    "--lr-decay-style",
    "constant",
    "--bf16",
    "--use-distributed-optimizer",
]
SAVING = ["--save", "checkpoints", "--load", "checkpoints", "--save-interval", "2"]
ENDLESS = ["--train-iters", "100000"]


def children(pid: int) -> dict[int, str]:
    """Process ids of the children, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended while we looked
            continue
    return found


def worker_of(process: Process) -> int:
    """The process that saves in the background."""
    (worker,) = (pid for pid, command in children(process.pid).items() if "spawn_main" in command)
    return worker


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def saved(folder: Path) -> str:
    """What the pointer names."""
    pointer = folder / "checkpoints/latest_checkpointed_iteration.txt"
    return pointer.read_text() if pointer.exists() else ""


@pytest.fixture
def run_with_a_stopped_worker(pretrain: Pretraining, tmp_path: Path) -> tuple[Process, int]:
    """A run whose worker was stopped after a save: the run now waits in the next one."""
    (process,) = pretrain.start(tmp_path, *FLAGS, *SAVING, *BACKGROUND, *ENDLESS)
    wait_for(lambda: saved(tmp_path) != "", "the first save")
    worker = worker_of(process)
    os.kill(worker, signal.SIGSTOP)
    rows = lambda: (tmp_path / "metrics.jsonl").stat().st_size  # noqa: E731
    seen = -1

    def stands_still() -> bool:
        nonlocal seen
        before, seen = seen, rows()
        return before == seen

    wait_for(lambda: stands_still(), "a step without end", 60.0)
    return process, worker


def test_a_run_that_saves_in_the_background_resumes_to_the_bit(pretrain: Pretraining, tmp_path: Path) -> None:
    uninterrupted = pretrain(tmp_path / "uninterrupted", *FLAGS, "--train-iters", "6")
    first = pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND, "--train-iters", "6", "--exit-interval", "4")
    assert "scheduled an async checkpoint save at iteration       4" in first.stdout
    assert newest_complete(tmp_path / "checkpoints") == (4, [])
    resumed = pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND, "--train-iters", "6")
    names = ("lm_loss", "kl", "grad_norm")
    assert resumed.values(*names) == uninterrupted.values(*names)
    assert newest_complete(tmp_path / "checkpoints") == (6, [])


def test_two_processes_save_in_the_background(pretrain: Pretraining, tmp_path: Path) -> None:
    pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND, "--train-iters", "4", processes=2)
    assert newest_complete(tmp_path / "checkpoints") == (4, [])


def test_killed_in_a_save_it_leaves_the_last_checkpoint_in_charge_and_no_process(
    pretrain: Pretraining, tmp_path: Path, run_with_a_stopped_worker: tuple[Process, int]
) -> None:
    process, worker = run_with_a_stopped_worker
    all_children = children(process.pid)
    pointer = int(saved(tmp_path))
    assert worker in all_children
    os.kill(process.pid, signal.SIGKILL)
    assert pretrain.finish([process], tmp_path).status == -signal.SIGKILL
    wait_for(lambda: not any(map(is_running, all_children)), "the end of its children", 20.0)
    assert newest_complete(tmp_path / "checkpoints") == (pointer, [])

    (tmp_path / "metrics.jsonl").unlink()
    again = pretrain(tmp_path, *FLAGS, *SAVING, *BACKGROUND, *ENDLESS, "--exit-interval", str(pointer + 2))
    assert list(again.steps) == [pointer + 1, pointer + 2]
    assert newest_complete(tmp_path / "checkpoints") == (pointer + 2, [])


def test_a_worker_that_died_is_not_waited_for(
    pretrain: Pretraining, tmp_path: Path, run_with_a_stopped_worker: tuple[Process, int]
) -> None:
    process, worker = run_with_a_stopped_worker
    pointer = int(saved(tmp_path))
    os.kill(worker, signal.SIGKILL)
    run = pretrain.finish([process], tmp_path)
    assert run.status == 1
    assert "the process that saves in the background ended with exit code -9" in run.stderr
    assert newest_complete(tmp_path / "checkpoints") == (pointer, [])


@pytest.mark.parametrize("moment", ["the worker's start", "the first step", "the first save"])
def test_a_signal_to_all_processes_of_a_job_does_not_harm_the_last_save(
    pretrain: Pretraining, tmp_path: Path, moment: str
) -> None:
    (process,) = pretrain.start(tmp_path, *FLAGS, *SAVING, *BACKGROUND, *ENDLESS, "--exit-signal-handler")

    def has_stepped() -> bool:
        return process.stdout_file.exists() and "iteration        1/" in process.stdout

    def is_there() -> bool:
        if moment == "the worker's start":
            return any("spawn_main" in command for command in children(process.pid).values())
        if moment == "the first step":
            return has_stepped()
        return saved(tmp_path) != ""

    wait_for(is_there, moment)
    if moment == "the worker's start":
        # The run itself can be asked to stop only once it trains.
        for pid in children(process.pid):
            os.kill(pid, signal.SIGTERM)
        wait_for(has_stepped, "the first step")
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    run = pretrain.finish([process], tmp_path)
    assert run.status == 0, run.stderr[-3000:]
    assert newest_complete(tmp_path / "checkpoints") == (max(run.steps), [])
