"""Megatron without a GPU, and the flags of recipes."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()  # before the test modules import Megatron

REPOSITORY = Path(__file__).parents[2]
MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "200000"]

Flags = Callable[..., list[str]]


@pytest.fixture
def recipe_flags(tmp_path: Path) -> Flags:
    """The command line that a recipe gives pretrain_msa.py, on generated data."""

    def flags(script: str, *arguments: str, **environment: str) -> list[str]:
        launcher = str(REPOSITORY / "examples/common/print_arguments.sh")
        variables = {"LAUNCH": launcher, "SAVE": str(tmp_path / "save"), "TE": "0", **environment}
        result = subprocess.run(
            [REPOSITORY / "examples" / script, *arguments, *MOCK],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        program, *rest = result.stdout.splitlines()
        assert Path(program).name == "pretrain_msa.py"
        return rest

    return flags
