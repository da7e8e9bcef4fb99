"""The runner of the benchmarks, from its arguments to its files."""

import json

import pytest
from benchmarks import ours, rows, run
from msa_kernels import sparse_attention


def test_the_whole_path_runs_on_a_cpu(tmp_path, capsys):
    status = run.main(
        ["--device", "cpu", "--tiny", "--suite", "bars", "--output", str(tmp_path), "--commit", "abc"]
    )
    assert status == 0
    found = rows.read(tmp_path / "rows.csv")
    assert {row.group for row in found} == {"topk", "select", "real", "memory", "warmup", "context"}
    assert all(row.passed for row in found if row.op != "topk")
    assert {row.commit for row in found} == {"abc"}
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["prefill_1m_speedup"]["value"] > 0
    assert figures["backward_share_real"]["shapes"] == 2
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run.main(["--table", "--output", str(tmp_path)]) == 0
    assert "select + attend" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed_and_its_bars_have_no_value(tmp_path, monkeypatch, capsys):
    def wrong(*arguments, **options):
        output = sparse_attention(*arguments, **options)
        return output._replace(out=output.out * 1.05)

    monkeypatch.setattr(ours, "sparse_attention", wrong)
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--suite",
        "quick",
        "--only",
        "context",
        "--output",
        str(tmp_path),
    ]
    assert run.main(arguments) == 1
    assert "out: error" in capsys.readouterr().err
    own = [row for row in rows.read(tmp_path / "rows.csv") if row.is_ours]
    assert own
    assert all(row.ms is None and row.check.startswith("failed") for row in own)
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["prefill_32k_speedup"]["value"] is None
    assert len(figures["wrong_results"]) == len(own)


def test_what_does_not_fit_into_the_seconds_is_left_out_and_named(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--suite", "quick", "--only", "topk", "--output", str(tmp_path)]
    assert run.main([*arguments, "--seconds", "1"]) == 0
    assert {row.check for row in rows.read(tmp_path / "rows.csv")} == {"skipped: 1 seconds were given"}
    assert json.loads((tmp_path / "summary.json").read_text())["topk_speedup"]["value"] is None


def test_merge_keeps_what_is_not_measured_again(tmp_path):
    common = ["--device", "cpu", "--tiny", "--suite", "quick", "--merge", "--output", str(tmp_path)]
    assert run.main([*common, "--only", "select", "--commit", "old"]) == 0
    assert run.main([*common, "--only", "topk", "--commit", "new"]) == 0
    found = {(row.group, row.commit) for row in rows.read(tmp_path / "rows.csv")}
    assert found == {("select", "old"), ("topk", "new")}


def test_another_suite_keeps_the_rows_and_entries_that_are_there(tmp_path):
    common = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert run.main([*common, "--suite", "quick", "--only", "topk"]) == 0
    path = tmp_path / "summary.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"model_prefill_128k_speedup": {"value": 3.5}}))
    assert run.main([*common, "--suite", "decode", "--shapes", "1m-b1"]) == 0
    assert {row.group for row in rows.read(tmp_path / "rows.csv")} == {"topk", "decode"}
    assert json.loads(path.read_text())["model_prefill_128k_speedup"] == {"value": 3.5}


def test_options_that_cannot_work_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu"])
    assert "needs --tiny" in capsys.readouterr().err
    assert run.main(["--device", "cpu", "--tiny", "--suite", "quick", "--only", "nothing"]) == 2
    assert "context, select, topk, real" in capsys.readouterr().err
    assert run.main(["--table", "--output", str(tmp_path)]) == 2
    assert "run the benchmarks first" in capsys.readouterr().err
