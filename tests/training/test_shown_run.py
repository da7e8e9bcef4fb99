"""A run whose output is kept, of which only the step lines are shown."""

from pathlib import Path

import pytest

from megatron_msa.training.shown_run import shown_run

SCRIPT = """
echo 'WARNING: step 0 is no step line'
echo '  step  1/2 warmup | loss 5.0   '
echo 'error: on stderr' >&2
echo ' validation at step 1: loss 4.0'
echo 'MSA phase is warmup'
echo "$PYTHON $OMP_NUM_THREADS"
"""


def test_step_lines_are_shown_and_everything_is_appended_to_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    log = tmp_path / "train.log"
    log.write_text("an earlier stage\n")
    assert shown_run(["bash", "-c", SCRIPT], log) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "       step  1/2 warmup | loss 5.0",
        "     error: on stderr",
        "      validation at step 1: loss 4.0",
        "     MSA phase is warmup",
    ]
    assert printed.err == ""
    lines = log.read_text().splitlines()
    assert lines[0] == "an earlier stage"
    assert lines[1] == "WARNING: step 0 is no step line"
    assert lines[-1].endswith("python 3") or lines[-1].endswith("python3.12 3")


def test_a_failed_run_returns_its_status_and_shows_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "train.log"
    assert shown_run(["bash", "-c", "seq 30; exit 7"], log) == 7
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0] == f"training failed with status 7; the end of {log}:"
    assert lines[1:] == [str(number) for number in range(6, 31)]
