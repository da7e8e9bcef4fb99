"""Starting programs from tests: Megatron keeps global state, and a torchrun world needs its own processes."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# What a launcher leaves behind would make a child believe that it belongs to another world.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(
    program: Path | str,
    *arguments: str | Path,
    processes: int = 1,
    timeout: float = 240.0,
    environment: dict[str, str] | None = None,
    expect_failure: bool = False,
) -> str:
    """Run a Python program, under torchrun if `processes` > 1, and return what it printed (both streams).

    Args:
        program: a path, relative ones are taken from the repository's root.
        arguments: its command line.
        processes: number of processes of the torchrun world; with 1 the program is started as plain Python.
        timeout: seconds after which the program is stopped and the test fails.
        environment: variables added to the inherited ones.
        expect_failure: True if the program must end with an error.

    Raises:
        AssertionError: the exit status is not the expected one; the message has the program's last lines.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(REPOSITORY / program), *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    completed = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if (completed.returncode != 0) != expect_failure:
        lines = completed.stdout.splitlines()
        raise AssertionError(f"{command} ended with {completed.returncode}:\n" + "\n".join(lines[-40:]))
    return completed.stdout
