"""A collective that fails because a peer is gone ends the process with advice; other errors pass."""

import argparse
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_msa.training.lost_processes import explained
from megatron_msa.training.save_processes import _end_with_parent_only

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41"


def arguments(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"rank": 3, "iteration": 0, "curr_iteration": 41, "save": None} | changes)


@pytest.mark.parametrize("error", [RuntimeError(GLOO), torch.distributed.DistBackendError("NCCL error")])
def test_the_message_names_the_iteration_and_the_checkpoint(
    error: RuntimeError, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(SystemExit) as stop, explained(arguments(save=str(tmp_path))):
        raise error
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: rank 3 lost another process of the job after 41 iterations.")
    assert message.endswith(f"--load {tmp_path}: its last complete checkpoint is that of iteration 40.")


@pytest.mark.parametrize("saves", [True, False])
def test_without_a_checkpoint_it_says_so(
    saves: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), explained(arguments(save=str(tmp_path) if saves else None)):
        raise RuntimeError(GLOO)
    assert "There is no checkpoint to continue from" in capsys.readouterr().err


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), explained(arguments()):
        raise RuntimeError("out of memory")


def _sum_forever(rank: int, store: str, ready: "multiprocessing.Queue[int]") -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with explained(arguments(rank=rank)):
        while True:
            torch.distributed.all_reduce(torch.ones(1))
            ready.put(rank)
            time.sleep(0.01)


def test_gloo_notices_a_killed_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    processes = [
        context.Process(target=_sum_forever, args=(rank, str(tmp_path / "store"), ready)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert {ready.get(timeout=60) for _ in range(4)} == {0, 1}
    processes[1].kill()
    processes[0].join(timeout=60)
    assert processes[0].exitcode == 1


def _own_a_child(pid: "multiprocessing.Queue[int]") -> None:
    child = os.fork()
    if child == 0:
        _end_with_parent_only(os.getppid())
        time.sleep(1000)
    pid.put(child)
    time.sleep(1000)


def test_a_child_ends_with_its_killed_parent() -> None:
    context = multiprocessing.get_context("fork")
    pid = context.Queue()
    parent = context.Process(target=_own_a_child, args=(pid,))
    parent.start()
    child = pid.get(timeout=60)
    time.sleep(0.2)  # until it has asked
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
