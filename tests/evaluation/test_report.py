"""Tables and pictures say what the cells say."""

import itertools
import json
import sys
from operator import methodcaller
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import command, plots, report, wandb_upload
from megatron_msa.evaluation.plan import Cell

HEADER = {
    "settings": {
        "samples": 2,
        "seed": 1,
        "style": "completion",
        "haystack_name": "lines",
        "methods": ["generation"],
    },
    "checkpoint": {"name": "run", "iteration": 1200},
    "versions": {"device": "CPU", "commit": "abc", "torch": "2.11", "triton": "3.6"},
}


def needle(attention: str, length: int, depth: float, *scores: float):
    return Cell(attention, "needle", length, depth), {"scores": {"generation": list(scores)}, "seconds": 1.0}


RESULTS = dict(
    [
        needle("msa", 1024, 0.0, 1.0, 0.0),
        needle("msa", 1024, 1.0, 1.0, 1.0),
        needle("msa", 131072, 0.0, 0.0, 0.0),
        needle("dense", 1024, 0.0, 1.0, 1.0),
        (Cell("msa", "perplexity", 1024), {"mean_loss": 2.5, "bin_ends": [512, 1024], "loss": [3.0, 2.0]}),
        (
            Cell("msa", "selection", 1024),
            {
                "block_recall": 0.7,
                "score_recall": 0.9,
                "per_layer": {"block_recall": {"1": 0.6, "2": 0.8}, "score_recall": {"1": 0.9, "2": 0.9}},
            },
        ),
    ]
)


def test_the_table_has_means_over_samples_and_depths_by_length():
    text = report.markdown(HEADER, RESULTS)
    for line in (
        "# Long-context evaluation of run, iteration 1,200",
        "| task | attention | 1,024 | 131,072 |",
        "| needle | msa | 0.750 | 0.000 |",
        "| needle | dense | 1.000 | - |",
        "| perplexity | msa | 2.5000 |",
        "| block recall | msa | 0.700 |",
        "| score recall | msa | 0.900 |",
    ):
        assert line in text.splitlines()
    assert "Guessing" not in text


def test_what_was_left_out_is_said_once_with_its_reason(tmp_path):
    skipped = {
        Cell(attention, task, 1024): {"skipped": f"{task} does not fit"}
        for attention in ("msa", "dense")
        for task in ("common_words", "perplexity", "selection")
    }
    text = report.markdown(HEADER, RESULTS | skipped)
    assert text.endswith(
        "## Left out\n\n- common_words at 1,024: common_words does not fit\n"
        "- perplexity at 1,024: perplexity does not fit\n- selection at 1,024: selection does not fit\n"
    )
    assert "| common words |" not in text
    assert plots.draw_all(tmp_path, skipped, title="run", methods=["generation"]) == []
    assert "Left out" not in report.markdown(HEADER, RESULTS)


def test_the_json_has_every_cell_with_settings_and_versions(tmp_path):
    report.write(tmp_path, HEADER, RESULTS)
    found = json.loads((tmp_path / "results.json").read_text())
    assert {key: found[key] for key in HEADER} == HEADER
    assert len(found["cells"]) == len(RESULTS)
    (row,) = (
        row for row in found["cells"] if (row["attention"], row["length"], row["depth"]) == ("msa", 1024, 0.0)
    )
    assert row["scores"] == {"generation": [1.0, 0.0]}
    assert row["mean_scores"] == {"generation": 0.5}
    assert not list(tmp_path.glob("*.partial*"))


def share_of(colour, picture) -> float:
    """Of the pixels."""
    return float((np.abs(picture[..., :3] - np.array(colour[:3])).max(-1) < 0.02).mean())


def test_a_score_has_the_same_colour_in_every_heatmap(tmp_path):
    """The scale is fixed: neither the best nor the worst score of a picture changes it."""
    half = plots._SCORES(0.5)
    for name, others in (("low", [0.0, 0.25]), ("high", [0.75, 1.0]), ("alone", [])):
        cells = [needle("msa", 1024 * 2**n, 0.5, score) for n, score in enumerate([0.5, *others])]
        plots.draw_heatmaps(tmp_path / f"{name}.png", dict(cells), title="run", method="generation")
        assert share_of(half, imread(tmp_path / f"{name}.png")) > 0.05


def test_missing_cells_are_grey_and_both_modes_side_by_side(tmp_path):
    plots.draw_heatmaps(tmp_path / "both.png", RESULTS, title="run", method="generation")
    one = {cell: result for cell, result in RESULTS.items() if cell.attention == "msa"}
    plots.draw_heatmaps(tmp_path / "one.png", one, title="run", method="generation")
    both, alone = imread(tmp_path / "both.png"), imread(tmp_path / "one.png")
    assert both.shape[1] > 1.4 * alone.shape[1]
    grey = (0xD5 / 255, 0xD8 / 255, 0xDC / 255)
    assert share_of(grey, both) > 0.05, "dense was not measured in three of four cells"


text_of = methodcaller("get_text")


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    return saved


def test_a_heatmap_has_each_score_at_its_length_and_depth_with_the_start_on_top(figures, tmp_path):
    scores = {
        (mode, length, depth): number / 10
        for number, (mode, length, depth) in enumerate(
            itertools.product(("msa", "dense"), (1024, 2048), (0.0, 0.5))
        )
    }
    cells = dict(needle(*place, score) for place, score in scores.items())
    plots.draw_heatmaps(tmp_path / "x.png", cells, title="run, iteration 7", method="generation")
    (figure,) = figures
    assert figure.get_suptitle() == "run, iteration 7: needle in a haystack"
    panels = dict(zip(("msa", "dense"), figure.axes, strict=False))
    assert panels["msa"].get_title(loc="left") == "MSA   mean 0.150"
    assert panels["dense"].get_title(loc="left") == "dense attention, same weights   mean 0.550"
    assert panels["msa"].get_ylabel() == "depth of the needle"
    shared = panels["msa"].yaxis
    rows = dict(zip(map(text_of, shared.get_ticklabels()), shared.get_ticklocs(), strict=True))
    for mode, axes in panels.items():
        columns = dict(zip(map(text_of, axes.get_xticklabels()), axes.get_xticks(), strict=True))
        height = {depth: axes.transData.transform((0, row))[1] for depth, row in rows.items()}
        assert height["0%"] > height["50%"]
        numbers = {text.get_position(): text.get_text() for text in axes.texts}
        for length, column in (("1K", 1024), ("2K", 2048)):
            for depth, row in (("0%", 0.0), ("50%", 0.5)):
                place, score = (columns[length], rows[depth]), scores[mode, column, row]
                assert numbers[place] == f"{score:.2f}"
                assert axes.images[0].get_array()[place[1], place[0]] == score


def test_the_other_pictures_have_their_titles(figures, tmp_path):
    plots.draw_all(tmp_path, RESULTS, title="run", methods=[])
    assert [figure.get_suptitle() for figure in figures] == [
        "run: selection against full attention",
        "run: loss by position",
    ]


def test_serving_costs_are_against_dense_attention():
    cost = {
        "length": 2048,
        "prefill": {"executed": 2e12, "dense": 5e12},
        "decode": {"executed": 4e9, "dense": 5e9},
        "bytes_read_sparse": 2**20,
        "bytes_read_dense": 8 * 2**20,
    }
    bytes_per_token = {"bf16": {"key_value": 1536, "index_key": 48}}
    result = {"cost": cost, "cache_bytes_per_token": bytes_per_token}
    lines = report.markdown(HEADER, {Cell("msa", "serving", 2048): result}).splitlines()
    assert "| 2,048 | 2 | 5 | 2.50x | 4 | 5 | 1.25x | 1 | 8 | 8.00x |" in lines
    assert "| bf16 | 1,536 | 48 |" in lines


def test_every_kind_of_cell_gets_its_picture(tmp_path):
    files = plots.draw_all(tmp_path, RESULTS, title="run", methods=["generation"])
    assert [file.name for file in files] == [
        "needle_generation.png",
        "recall_by_length.png",
        "perplexity_by_position.png",
    ]
    assert all(imread(file).std() > 0.01 for file in files)


def test_a_selection_without_dropped_blocks_is_drawn_as_such(tmp_path):
    nothing = {
        "block_recall": None,
        "score_recall": None,
        "per_layer": {"block_recall": {}, "score_recall": {}},
    }
    plots.draw_all(tmp_path, {Cell("msa", "selection", 64): nothing}, title="run", methods=[])
    assert (tmp_path / "recall_by_length.png").exists()
    assert "Selection" not in report.markdown(HEADER, {Cell("msa", "selection", 64): nothing})


def test_uploads_have_one_number_per_task_mode_and_length():
    assert wandb_upload.scalars(RESULTS, ["generation"]) == {
        "generation/needle/msa/1024": 0.75,
        "generation/needle/msa/131072": 0.0,
        "generation/needle/dense/1024": 1.0,
        "mean_loss/perplexity/msa/1024": 2.5,
        "block_recall/selection/msa/1024": 0.7,
        "score_recall/selection/msa/1024": 0.9,
    }


class Wandb:
    """The part of the package that is used; the run refuses like a server if it is told to."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.errors = SimpleNamespace(Error=self.Error)
        self.logged: list[tuple[dict, int]] = []
        self.begun: dict = {}

    def init(self, **options):
        self.begun = options
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def Image(self, path):
        return path

    def log(self, values, *, step):
        if self.refusal:
            raise self.Error(self.refusal)
        self.logged.append((values, step))


def upload(files=()):
    wandb_upload.upload(RESULTS, files, HEADER, project="p", name="n", methods=["generation"])


def test_an_upload_is_one_run_with_numbers_pictures_and_settings(monkeypatch, tmp_path):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    upload([tmp_path / "needle_generation.png"])
    ((values, step),) = package.logged
    assert step == HEADER["checkpoint"]["iteration"]
    picture = {"needle_generation": str(tmp_path / "needle_generation.png")}
    assert values == wandb_upload.scalars(RESULTS, ["generation"]) | picture
    assert (package.begun["project"], package.begun["name"]) == ("p", "n")
    assert package.begun["config"] == HEADER


def test_an_upload_that_fails_says_that_the_results_are_written(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("api_key not configured\n(no-tty)"))
    with pytest.raises(ConfigError, match=r"--wandb-project p: .*\(api_key not configured \(no-tty\)\)"):
        upload()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        upload()


def test_a_missing_package_is_noticed_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folders = ["--load", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    assert command.main(None, ["run", *folders, "--lengths", "8", "--wandb-project", "p"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert command.main(None, ["collect", "x", "--output", str(tmp_path), "--wandb-project", "p"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
