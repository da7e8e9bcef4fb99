"""Triton's interpreter runs the kernels' Python source on a CPU, with NumPy in the place of the GPU.

On a GPU the kernel tests run there. Without one, ``test_triton_in_interpreter`` runs them in a process of its
own, through the interpreter: Triton decides at import whether it compiles or interprets, so this cannot be
switched inside a process that has imported it already. A single file: TRITON_INTERPRET=1 pytest FILE.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(
    not (INTERPRETED or HAS_GPU), reason="no GPU: run by test_triton_in_interpreter"
)
needs_interpreter = pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="run by this process, without another")


# What only a GPU runs in a second: `make test` leaves it out of the interpreter, `make test-slow` has it.
slow_in_interpreter = [] if HAS_GPU and not INTERPRETED else [pytest.mark.slow]


def run_tests_in_interpreter(*test_files: str, slow: bool = False) -> None:
    """Run the fast tests of files, or their slow ones, in one process whose Triton interprets.

    Fails with that process's output.
    """
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *test_files]
    # Without --tb=short a failure prints the tensors of every frame, which takes minutes.
    command += ["--tb=short", "-m", "slow" if slow else "not slow"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout


def repair_loop_bounds() -> None:
    """Lets Triton 3.6's interpreter take tensors as loop bounds with NumPy 2.5.

    It holds scalars as arrays of one element and converts them by int(), which NumPy 2.5 refuses for arrays
    that have a dimension.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    repair_loop_bounds()
