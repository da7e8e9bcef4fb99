"""tools/soak_report.py: what it notices in the metrics of a run in three legs."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soak_report():
    spec = importlib.util.spec_from_file_location("soak_report", ROOT / "tools" / "soak_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(step, **changes):
    values = {
        "lm_loss": 3.0 - step / 1000,
        "seconds": 0.3,
        "phase": "sparse",
        "memory_gib": 40.0,
        "reserved_memory_gib": 60.0,
        "peak_memory_gib": 55.0,
    }
    return {"event": "step", "iteration": step, **values, **changes}


def run(soak_report, folder, legs, steps=500):
    files = []
    for number, rows in enumerate(legs, 1):
        files.append(str(folder / f"leg{number}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(each) + "\n" for each in rows))
    status = soak_report.main([*files, "--steps", str(steps), "--output", str(folder)])
    return status, json.loads((folder / "soak.json").read_text())


def legs(change=lambda row: row):
    spans = (range(1, 151), range(151, 251), range(201, 501))
    return [[change(row(step, seconds=9.0 if step == span[0] else 0.3)) for step in span] for span in spans]


def test_a_run_that_lost_nothing(soak_report, tmp_path):
    status, report = run(soak_report, tmp_path, legs())
    assert status == 0
    assert report["problems"] == []
    assert report["steps"] == 500
    assert report["repeated_steps"] == 50
    assert report["repeated_steps_largest_difference"] == 0
    # The first step of each leg compiles and is no step time.
    assert report["seconds_per_step"] == {"median": 0.3, "p5": 0.3, "p95": 0.3, "largest": 0.3}
    assert report["peak_memory_gib"] == 55.0
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_step_is_named(soak_report, tmp_path):
    found = legs()
    del found[2][200]
    status, report = run(soak_report, tmp_path, found)
    assert status == 1
    assert report["problems"] == ["1 of 500 steps are missing, the first 401"]


def test_a_repeated_step_with_another_loss_is_named(soak_report, tmp_path):
    found = legs()
    found[2][7]["lm_loss"] += 0.05
    status, report = run(soak_report, tmp_path, found)
    assert status == 1
    assert report["problems"] == ["step 208 was repeated with a loss 0.050 away"]


def test_memory_that_grows_is_named(soak_report, tmp_path):
    def leaking(row):
        return row | {"memory_gib": 40 + row["iteration"] / 400}

    status, report = run(soak_report, tmp_path, legs(leaking))
    assert status == 1
    assert report["problems"] == ["memory_gib grew from 40.129 to 41.126 in steps 1 to 500"]


def test_reserved_memory_is_compared_within_a_process(soak_report, tmp_path):
    found = legs()
    for reserved, leg in zip((60.0, 62.0, 64.0), found, strict=True):
        for each in leg:
            each["reserved_memory_gib"] = reserved
    assert run(soak_report, tmp_path, found)[0] == 0
    for each in found[2][150:]:
        each["reserved_memory_gib"] = 64.7  # as the first save of a process did
    assert run(soak_report, tmp_path, found)[0] == 0
    for each in found[2][150:]:
        each["reserved_memory_gib"] = 68.0
    status, report = run(soak_report, tmp_path, found)
    assert status == 1
    assert report["problems"] == ["reserved_memory_gib grew from 64.000 to 68.000 in steps 201 to 500"]


def test_a_leg_without_steps_is_refused(soak_report, tmp_path, capsys):
    for name, text in (("leg1", json.dumps(row(1)) + "\n"), ("leg2", "")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = [str(tmp_path / f"leg{n}.jsonl") for n in (1, 2)]
    assert soak_report.main([*files, "--steps", "2", "--output", str(tmp_path)]) == 2
    assert "leg2.jsonl holds no logged step" in capsys.readouterr().err
