"""Reading a run's metrics and drawing them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_msa.errors import ConfigError
from megatron_msa.training.curves import PhaseSpan, draw_curves, load_metrics, main

ROOT = Path(__file__).resolve().parents[2]


def step(iteration, phase="warmup", **values):
    return {"event": "step", "iteration": iteration, "phase": phase, "lm_loss": 10.0 / iteration} | values


def switch(iteration, phase, previous):
    return {"event": "phase", "iteration": iteration, "phase": phase, "previous": previous}


def write(path, rows):
    """Rows as JSON lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return path


def full_run(steps=400, start_of_sparse=100):
    """What a run writes: sampled recall, a validation loss now and then, one switch."""
    rows = [switch(0, "warmup", None)]
    for i in range(1, steps + 1):
        if i == start_of_sparse + 1:
            rows.append(switch(start_of_sparse, "sparse", "warmup"))
        kl = {str(layer): layer / i for layer in range(1, 8)}
        row = step(i, "warmup" if i <= start_of_sparse else "sparse", kl=sum(kl.values()), kl_per_layer=kl)
        if i % 20 == 0:
            row |= {
                "score_recall": 0.9,
                "block_recall": 0.7,
                "local_block_share": 0.4,
                "first_block_share": 0.1,
            }
            rows.append({"event": "validation", "iteration": i, "lm_loss": 10.0 / i + 0.1})
        rows.append(row)
    return rows


@pytest.fixture
def drawn(monkeypatch):
    """The figures that draw_curves saves."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    return figures


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_value_is_read_where_it_was_measured(tmp_path):
    metrics = load_metrics(
        write(tmp_path / "m.jsonl", [step(1), step(2, score_recall=0.5), step(3, score_recall=None)])
    )
    assert metrics.series("lm_loss") == ([1, 2, 3], [10.0, 5.0, 10 / 3])
    assert metrics.series("score_recall") == ([2], [0.5])
    assert metrics.series("never_logged") == ([], [])


def test_layers_come_in_numerical_order(tmp_path):
    rows = [step(1, kl_per_layer={"10": 3.0, "2": 1.0}), step(2), step(3, kl_per_layer={"2": 2.0})]
    layers = load_metrics(write(tmp_path / "m.jsonl", rows)).layers("kl_per_layer")
    assert list(layers.items()) == [(2, ([1, 3], [1.0, 2.0])), (10, ([1], [3.0]))]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    rows = [step(1, lm_loss=float("nan")), step(2, lm_loss=float("inf")), step(3)]
    assert load_metrics(write(tmp_path / "m.jsonl", rows)).series("lm_loss")[0] == [3]


def test_the_last_row_of_an_iteration_wins(tmp_path):
    rows = [step(1), step(2, lm_loss=7.0), step(3), step(2, lm_loss=1.0)]
    assert load_metrics(write(tmp_path / "m.jsonl", rows)).series("lm_loss")[1] == [10.0, 1.0, 10 / 3]


def test_a_resumed_process_discards_what_was_logged_beyond_its_checkpoint(tmp_path):
    rows = [switch(0, "warmup", None), *(step(i) for i in range(1, 7)), switch(6, "sparse", "warmup")]
    rows += [{"event": "validation", "iteration": 5, "lm_loss": 1.0}, step(7, "sparse")]
    rows += [switch(4, "warmup", None), step(5, lm_loss=0.5)]
    metrics = load_metrics(write(tmp_path / "m.jsonl", rows))
    assert metrics.series("lm_loss")[0] == [1, 2, 3, 4, 5]
    assert metrics.series("lm_loss")[1][-1] == 0.5
    assert metrics.validations == []
    assert metrics.phases == [PhaseSpan("warmup", 0, 5)]


def test_an_unfinished_last_line_is_ignored(tmp_path):
    metrics = load_metrics(write(tmp_path / "m.jsonl", [step(1), '{"event": "step", "iterat']))
    assert len(metrics.steps) == 1
    assert metrics.skipped_lines == 0


def test_a_row_that_follows_an_unfinished_one_in_the_same_line_is_read(tmp_path):
    rows = [step(1), '{"event": "step", "iterat' + json.dumps(step(2)), step(3)]
    metrics = load_metrics(write(tmp_path / "m.jsonl", rows))
    assert metrics.series("lm_loss")[0] == [1, 2, 3]
    assert metrics.skipped_lines == 0


def test_unreadable_lines_are_counted(tmp_path):
    assert (
        load_metrics(write(tmp_path / "m.jsonl", [step(1), "garbage", "[1]", "", step(2)])).skipped_lines == 2
    )


def test_unknown_events_and_keys_are_ignored(tmp_path):
    rows = [step(1, colour="blue"), {"event": "lunch", "iteration": 2}, {"iteration": 3}, {"event": "step"}]
    assert load_metrics(write(tmp_path / "m.jsonl", rows)).series("lm_loss")[0] == [1]


def test_a_phase_begins_where_its_row_says_and_otherwise_after_the_last_step_before_it(tmp_path):
    steps = [step(10), step(20), step(30, "sparse"), step(40, "sparse")]
    exact = load_metrics(
        write(tmp_path / "a.jsonl", [switch(0, "warmup", None), *steps, switch(24, "sparse", "warmup")])
    )
    assert exact.phases == [PhaseSpan("warmup", 0, 24), PhaseSpan("sparse", 24, 40)]
    coarse = load_metrics(write(tmp_path / "b.jsonl", steps))
    assert coarse.phases == [PhaseSpan("warmup", 9, 20), PhaseSpan("sparse", 20, 40)]


def test_phases_are_known_from_their_rows_alone(tmp_path):
    rows = [
        switch(0, "warmup", None),
        step(1, None),
        step(2, None),
        switch(2, "sparse", "warmup"),
        step(3, None),
    ]
    metrics = load_metrics(write(tmp_path / "m.jsonl", rows))
    assert metrics.phases == [PhaseSpan("warmup", 0, 2), PhaseSpan("sparse", 2, 3)]


def test_a_file_without_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no logged step"):
        load_metrics(write(tmp_path / "m.jsonl", [switch(0, "warmup", None)]))


def test_the_picture_shows_every_curve_and_the_phase_switch(tmp_path, drawn):
    metrics = load_metrics(write(tmp_path / "m.jsonl", full_run()))
    draw_curves(metrics, tmp_path / "deep" / "curves.png", title="A run", unigram_loss=3.25)
    loss, kl, recall, selection = drawn[0].axes[:4]

    assert (tmp_path / "deep" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0].get_suptitle() == "A run"
    assert legend_texts(loss) == ["train (mean of 7 logged steps)", "validation", "unigram baseline 3.250"]
    assert legend_texts(kl) == ["sum over layers, smoothed"]
    assert len(legend_texts(recall)) == len(legend_texts(selection)) == 2
    assert (
        len(kl.lines) == 2 * (7 + 2) + 1
    )  # seven layers, the sum raw and smoothed, in two phases; the switch
    for axes in (loss, kl, recall, selection):
        assert [text.get_text() for text in axes.texts] == ["warmup", "sparse"]
        assert any(list(line.get_xdata()) == [100, 100] for line in axes.lines)
        assert axes.get_xlim() == (0, 400)


def test_the_kl_is_not_connected_across_a_phase_switch(tmp_path, drawn):
    draw_curves(load_metrics(write(tmp_path / "m.jsonl", full_run())), tmp_path / "c.png", title="")
    for line in drawn[0].axes[1].lines[:-1]:
        assert line.get_xdata()[-1] <= 100 or line.get_xdata()[0] > 100


def test_few_layers_are_named_in_the_legend(tmp_path, drawn):
    rows = [step(i, kl=3.0, kl_per_layer={"1": 1.0, "4": 2.0}) for i in range(1, 9)]
    draw_curves(load_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path / "c.png", title="")
    assert legend_texts(drawn[0].axes[1]) == ["layer 1", "layer 4", "sum over layers"]
    assert len(drawn[0].axes) == 4  # no colour bar


def test_a_panel_without_measurements_says_so(tmp_path, drawn):
    draw_curves(load_metrics(write(tmp_path / "m.jsonl", [step(1, "dense")])), tmp_path / "c.png", title="")
    for axes in drawn[0].axes[1:]:
        assert "not measured" in [text.get_text() for text in axes.texts]


def test_smoothing_neither_lags_nor_bends_at_the_ends(tmp_path, drawn):
    rows = [step(i, lm_loss=5.0 - i / 500) for i in range(1, 1001)]
    draw_curves(load_metrics(write(tmp_path / "m.jsonl", rows)), tmp_path / "c.png", title="")
    raw, smooth = drawn[0].axes[0].lines[:2]
    assert list(smooth.get_ydata()) == pytest.approx(list(raw.get_ydata()))


def test_the_tool_writes_the_picture_beside_the_metrics(tmp_path):
    metrics = write(tmp_path / "metrics.jsonl", full_run(60, 20))
    tool = ROOT / "tools" / "plot_curves.py"
    done = subprocess.run([sys.executable, tool, metrics], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "curves.png").exists()


def test_the_tool_names_a_missing_file_and_fails(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
