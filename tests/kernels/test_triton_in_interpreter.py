"""The kernels' tests without a GPU: in Triton's interpreter, all in one process, which starts slowly."""

from pathlib import Path

import pytest
from triton_interpreter import needs_interpreter, run_tests_in_interpreter

FILES = sorted(map(str, Path(__file__).parent.glob("test_*_triton.py")))


@needs_interpreter
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_the_kernels_pass_their_tests_in_the_interpreter(slow):
    run_tests_in_interpreter(*FILES, slow=slow)
