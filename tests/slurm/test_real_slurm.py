"""The job files under a real SLURM of two nodes on this machine, both on the loopback interface."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_MISSING = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(_MISSING), reason=f"SLURM is not installed: no {', '.join(_MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES State=UP MaxTime=60 PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n1,n2 State=UP MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM.

    Attributes:
        environment: with which its commands find it.
    """

    environment: dict[str, str]

    def run(self, *command: str | Path, **environment: str) -> str:
        result = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment | environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str, name: str) -> str:
        """A field of a job's description."""
        match = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", number))
        assert match
        return match[1]

    def wait(self, number: str, state: str, seconds: float) -> None:
        wait_for(lambda: self.job(number, "JobState") == state, f"job {number} {state}", seconds)

    def start_now(self, number: str) -> None:
        """Start a job that is back in the queue, for which SLURM would wait for two minutes."""
        time.sleep(10)  # a start in the second of the requeue is taken for the one that was revoked
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=free_ports(4))
    )
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "LAUNCH", "PYTHON")
    environment = {key: value for key, value in os.environ.items() if key not in launchers}
    environment |= {"SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = {name: folder / f"munge.{name}" for name in ("key", "sock", "pid", "log", "seed")}
    names = {"key": "key-file", "sock": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    made = Cluster(environment)
    try:
        made.run("munged", "--force", *(f"--{names[name]}={path}" for name, path in munge.items()))
        made.run("slurmctld", "-c", "-f", configuration)
        for node in ("n1", "n2"):
            made.run("slurmd", "-c", "-N", node, "-f", configuration)
        wait_for(lambda: made.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes", 60)
        yield made
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def site(folder: Path) -> dict[str, str]:
    return {
        "ACCOUNT": "none",
        "PARTITION": "main",
        "NODES": "2",
        "GPUS_PER_NODE": "0",
        "CPUS_PER_TASK": "1",
        "VENV": sys.prefix,
        "LOGS": str(folder / "logs"),
        "SAVE": str(folder / "save"),
        "TIME": "20:00",
        "SAVE_SECONDS": "60",
        "MASTER_ADDR": "127.0.0.1",  # the nodes have no addresses of their own
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
    }


def steps(folder: Path) -> list[int]:
    file = folder / "save/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["iteration"] for row in rows if row["event"] == "step"]


def test_a_run_is_warned_saves_returns_to_the_queue_and_ends_there(cluster: Cluster, tmp_path: Path) -> None:
    last = 30
    job = cluster.run("examples/slurm/pretrain.sbatch", "tests/slurm/recipe.sh", str(last), **site(tmp_path))
    wait_for(lambda: len(steps(tmp_path)) >= 3, "three steps", 240)
    # What SLURM does before the time limit and at preemption.
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    cluster.wait(job, "PENDING", 120)
    saved = (tmp_path / "save/latest_checkpointed_iteration.txt").read_text()
    assert saved == str(steps(tmp_path)[-1])
    assert int(saved) < last, "the run ended before the signal: make it longer"

    cluster.start_now(job)
    cluster.wait(job, "COMPLETED", 240)
    assert steps(tmp_path) == list(range(1, last + 1)), "the second attempt repeated or left out steps"
    assert cluster.job(job, "Restarts") == "1"
    assert cluster.job(job, "ExitCode") == "0:0"
    attempts = sorted(path.name for path in (tmp_path / "logs" / job).iterdir())
    assert attempts == ["attempt-0", "attempt-1"]
    for attempt in attempts:
        ranks = sorted(path.name for path in (tmp_path / "logs" / job / attempt).glob("rank-*"))
        assert ranks == ["rank-0.log", "rank-1.log"]


def test_a_job_that_fails_is_tried_again_and_ends_with_the_status_of_its_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    values = site(tmp_path) | {"MAX_RETRIES": "1"}
    job = cluster.run("examples/slurm/pretrain.sbatch", "srun", "bash", "-c", "exit 3", **values)
    cluster.wait(job, "PENDING", 60)
    cluster.start_now(job)
    cluster.wait(job, "FAILED", 60)
    assert cluster.job(job, "ExitCode") == "3:0"
    assert cluster.job(job, "Restarts") == "1"


def test_a_preempted_run_saves_makes_way_and_goes_on_afterwards(cluster: Cluster, tmp_path: Path) -> None:
    last = 30
    job = cluster.run("examples/slurm/pretrain.sbatch", "tests/slurm/recipe.sh", str(last), **site(tmp_path))
    wait_for(lambda: len(steps(tmp_path)) >= 3, "three steps", 240)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N", "2", "--wrap", "sleep 5", "-o", "/dev/null"
    )
    cluster.wait(urgent, "COMPLETED", 240)
    assert cluster.job(job, "JobState") == "PENDING"
    saved = (tmp_path / "save/latest_checkpointed_iteration.txt").read_text()
    assert saved == str(steps(tmp_path)[-1])
    assert int(saved) < last, "the run ended before it was preempted: make it longer"

    cluster.start_now(job)
    cluster.wait(job, "COMPLETED", 240)
    assert steps(tmp_path) == list(range(1, last + 1)), "the second attempt repeated or left out steps"


def test_the_status_of_processes_that_end_apart_is_kept(cluster: Cluster, tmp_path: Path) -> None:
    values = site(tmp_path) | {"MAX_RETRIES": "0"}
    job = cluster.run("examples/slurm/pretrain.sbatch", "tests/slurm/end_apart.sh", "16", **values)
    cluster.wait(job, "FAILED", 120)
    assert cluster.job(job, "ExitCode") == "16:0"


def test_a_process_that_waits_for_one_that_failed_is_ended_and_the_status_is_that_of_the_latter(
    cluster: Cluster, tmp_path: Path
) -> None:
    values = site(tmp_path) | {"MAX_RETRIES": "0", "SRUN_FLAGS": "--wait=5"}
    job = cluster.run("examples/slurm/pretrain.sbatch", "tests/slurm/end_apart.sh", "3", "300", **values)
    cluster.wait(job, "FAILED", 120)
    assert cluster.job(job, "ExitCode") == "3:0"
