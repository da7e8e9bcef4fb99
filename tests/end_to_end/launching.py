"""Starting pretraining runs from tests, and reading what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# Two layers, the first with a dense feed-forward; sequences of 8 blocks of which each query attends to 3.
_SMALLER = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8
    --num-experts 4 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16 --moe-layer-freq [0,1]
    --seq-length 128 --max-position-embeddings 128 --msa-block-size 16 --msa-num-selected-blocks 3
    --lr-warmup-iters 0 --log-interval 1 --eval-iters 0 --msa-quality-interval 0
"""

BACKGROUND = ["--async-save", "--use-persistent-ckpt-worker"]
"""Save in the background."""


def tiny_flags() -> list[str]:
    """The flags of examples/tiny, made smaller."""
    script = 'source examples/tiny/flags.sh && printf "%s\\n" "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}"'
    result = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [*result.stdout.splitlines(), *_SMALLER.split()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Process:
    """A started process."""

    pid: int
    stdout_file: Path
    stderr_file: Path

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def terminate(self) -> None:
        """Send SIGTERM, as a batch system does before a time limit."""
        os.kill(self.pid, signal.SIGTERM)


@dataclass
class Server:
    """The client side of `fork_server.py`."""

    _process: subprocess.Popen[str] = field(init=False)
    _unfinished: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/end_to_end/fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
            text=True,
        )

    def start(
        self, program: str, arguments: list[str], folder: Path, environment: dict[str, str], name: str
    ) -> Process:
        """Start a program; its output goes to NAME.out and NAME.err in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        process = Process(0, folder / f"{name}.out", folder / f"{name}.err")
        process.pid = self._ask(
            program=program,
            arguments=arguments,
            folder=str(folder),
            environment=environment,
            stdout=str(process.stdout_file),
            stderr=str(process.stderr_file),
        )
        self._unfinished.add(process.pid)
        return process

    def wait(self, process: Process) -> int:
        """Wait for a process; its exit status, or minus the signal that ended it."""
        status = self._ask(wait=process.pid)
        self._unfinished.discard(process.pid)
        return status

    def close(self) -> None:
        """Stop the server and what still runs, for example after a test ran into its time limit."""
        for pid in self._unfinished:
            os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        status: exit status; with several processes the first one that is not 0.
        rows: of its metrics file.
    """

    status: int
    stdout: str
    stderr: str
    rows: list[dict[str, Any]]

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The logged steps by iteration."""
        return {row["iteration"]: row for row in self.rows if row["event"] == "step"}

    def values(self, *names: str) -> dict[int, tuple[Any, ...]]:
        """Some values of each logged step."""
        return {iteration: tuple(row[name] for name in names) for iteration, row in self.steps.items()}


@dataclass(frozen=True)
class Pretraining:
    """Runs of pretrain_msa.py on a small text.

    Attributes:
        data: flags that name the text and its tokenizer.
    """

    server: Server
    flags: list[str]
    data: list[str]

    def start(
        self, folder: Path, *flags: str, processes: int = 1, environment: dict[str, str] | None = None
    ) -> list[Process]:
        """Start a run in a folder; flags given here win over the tiny ones."""
        arguments = [*self.flags, *self.data, "--metrics-file", str(folder / "metrics.jsonl"), *flags]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
        started = []
        for rank in range(processes):
            variables = {} if processes == 1 else {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables |= environment or {}
            name = f"{len(list(folder.glob('*.out')))}-rank{rank}"
            started.append(self.server.start("pretrain_msa.py", arguments, folder, variables, name))
        return started

    def finish(self, processes: list[Process], folder: Path) -> Run:
        """Wait for a run; the streams are those of all processes."""
        statuses = [self.server.wait(process) for process in processes]
        metrics = folder / "metrics.jsonl"
        return Run(
            status=next((status for status in statuses if status), 0),
            stdout="".join(process.stdout for process in processes),
            stderr="".join(process.stderr for process in processes),
            rows=read_rows(metrics) if metrics.exists() else [],
        )

    def __call__(
        self,
        folder: Path,
        *flags: str,
        processes: int = 1,
        environment: dict[str, str] | None = None,
        expect_status: int = 0,
    ) -> Run:
        """Run to the end; a second run in the same folder appends to the same metrics."""
        run = self.finish(self.start(folder, *flags, processes=processes, environment=environment), folder)
        assert run.status == expect_status, f"status {run.status}\n{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
        return run


def wait_for(condition: Any, what: str, seconds: float = 120.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
