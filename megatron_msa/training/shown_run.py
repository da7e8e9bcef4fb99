"""A training run as a process of its own, for programs that show only what matters of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SHOWN = re.compile(r"\s*(step |validation at|MSA phase|error:)")
_TAIL = 25


def shown_run(command: Sequence[str], log: Path) -> int:
    """Run a training script, print its step lines, and append everything that it prints to a file.

    A run that fails has the end of the file printed on stderr.

    Args:
        command: the script and its flags. It finds the Python to use in `PYTHON`, and `OMP_NUM_THREADS` is
            set where it is not.
        log: of both streams of the run.

    Returns:
        The exit status.
    """
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 8)))
    with log.open("a") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if _SHOWN.match(line):
                print("     " + line.rstrip(), flush=True)
        status = process.wait()
    if status:
        print(f"training failed with status {status}; the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text().splitlines()[-_TAIL:]), file=sys.stderr)
    return status
