"""Which checkpoints go when a newer one is complete."""

from pathlib import Path

import pytest

from megatron_msa.training.kept_checkpoints import superseded


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [900, 800, 700]), (2, [800, 700]), (3, [700]), (9, [])],
)
def test_the_newest_and_those_of_the_interval_stay(tmp_path: Path, count: int, expected: list[int]) -> None:
    for iteration in (500, 700, 800, 900, 1000, 1100):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    (tmp_path / "iter_0000600").symlink_to(tmp_path / "iter_0000500")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1000")
    # 1000 is complete, 1100 is what a killed run left behind.
    assert superseded(tmp_path, 900, count, 500) == expected
