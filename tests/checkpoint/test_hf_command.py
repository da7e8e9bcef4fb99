"""The command-line tool: a whole way there and back, and errors as one line with exit status 2."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.hf_models import save_model
from tests.helpers import REPOSITORY

Tool = Callable[..., int]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """tools/convert_checkpoint.py in this process: its imports take longer than its work."""
    path = REPOSITORY / "tools/convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        return module.main()

    return run


def test_there_and_back_with_verification(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model("minimax_m3_text", tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    there = ("--load", tmp_path / "hf", "--save", tmp_path / "megatron")
    assert tool("hf-to-megatron", *there, "--verify", "--verify-tokens", "40") == 0
    printed = capsys.readouterr().out
    assert "hf-to-megatron" in printed
    assert "both models in fp32 take about 0.0 GiB" in printed
    assert "--msa-layer-freq '([0]*1+[1]*2)'" in printed
    assert f"--tokenizer-model {tmp_path / 'megatron/hf'}" in printed
    difference = float(printed.split("largest difference of a logit ")[1].split()[0])
    assert 0 < difference < 2e-5

    back = ("--load", tmp_path / "megatron", "--save", tmp_path / "back", "--max-shard-size", "20KB")
    assert tool("megatron-to-hf", *back, "--verify", "--verify-tokens", "40") == 0
    printed = capsys.readouterr().out
    assert float(printed.split("largest difference of a logit ")[1].split()[0]) < 2e-5
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "back/conversion_report.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf-to-megatron", "--load", "nowhere"], "nowhere/config.json cannot be read"),
        (["hf-to-megatron", "--load", "x", "--pad-vocab-to-multiple-of", "0"], "it must be positive"),
        (["megatron-to-hf", "--load", "nowhere"], "--load nowhere has no checkpoint"),
        (["megatron-to-hf", "--load", "nowhere", "--max-shard-size", "big"], "--max-shard-size is 'big'"),
    ],
)
def test_errors_are_one_line_and_status_2(
    tool: Tool,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool(*arguments, "--save", "target") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())
