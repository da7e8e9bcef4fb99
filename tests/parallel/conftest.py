"""Ten steps of one small model from one initial checkpoint, in any parallel layout."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.launching import Pretraining
from tests.parallel.selection_record import read_entries
from tests.parallel.ten_steps import FLAGS, MARGIN, TenSteps

RunLayout = Callable[..., TenSteps]


@pytest.fixture(scope="session")
def initial_checkpoint(pretrain: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights after one step. A fresh start would not do: layouts draw different initial values."""
    folder = tmp_path_factory.mktemp("initial")
    save = ["--save", str(folder), "--save-interval", "1", "--exit-interval", "1", "--no-save-optim"]
    pretrain(folder, *FLAGS, *save)
    return folder


@pytest.fixture(scope="session")
def run_layout(
    pretrain: Pretraining, initial_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunLayout:
    """Runs the ten steps with these flags added."""

    def run(*flags: str, processes: int = 1) -> TenSteps:
        folder = tmp_path_factory.mktemp("layout")
        (folder / "selections").mkdir()
        load = ["--load", str(initial_checkpoint), "--finetune"]  # from iteration 0, without optimizer state
        save = ["--save", str(folder), "--save-interval", "10", "--no-save-optim"]
        environment = {"RECORD_SELECTIONS_IN": str(folder / "selections")}
        run = pretrain(folder, *FLAGS, *load, *save, *flags, processes=processes, environment=environment)
        return TenSteps.read(run, folder)

    return run


@pytest.fixture(scope="session")
def single(run_layout: RunLayout) -> TenSteps:
    """One process, four microbatches of one sequence."""
    result = run_layout()
    margin = min(entry.margin for entry in read_entries(result.folder / "selections"))
    assert margin > MARGIN, f"two blocks are {margin:.1e} apart, rounding could swap them: use another --seed"
    return result
