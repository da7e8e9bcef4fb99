"""What happens to a long run: damaged and old checkpoints, a full disk, a NaN from the index loss.

Its other accidents are tested where the processes are: killed while saving (test_resume.py), saving in the
background (test_background_save.py), SIGTERM (test_resume.py, tests/slurm), a dead and a silent process
(tests/parallel/test_killed_process.py).
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_msa.checkpoint.newest import newest_complete
from megatron_msa.errors import ConfigError
from tests.end_to_end.launching import BACKGROUND, Pretraining, wait_for

pytestmark = pytest.mark.slow

FLAGS = ["--lr-decay-style", "constant", "--msa-schedule", "warmup@0,sparse@3", "--train-iters", "6"]
FLAGS += ["--bf16", "--use-distributed-optimizer", "--save", "checkpoints", "--load", "checkpoints"]
RETAINED = ["--save-interval", "2", "--save-retain-interval", "4"]


def iterations(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_repeats_its_steps(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    first = pretrain(tmp_path, *FLAGS, *RETAINED)
    saved = tmp_path / "checkpoints"
    # The one of iteration 2 was deleted when the next was complete; every fourth stays.
    wait_for(lambda: iterations(saved) == [4, 6], "the old checkpoint's end", 20.0)
    assert newest_complete(saved) == (6, [])

    shard = largest_shard(saved / "iter_0000006")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    iteration, skipped = newest_complete(saved)
    assert iteration == 4
    (line,) = skipped
    assert f"iteration 6 is damaged: {shard.name} has {len(whole) - 1:,} bytes of" in line

    (tmp_path / "metrics.jsonl").unlink()
    again = pretrain(tmp_path, *FLAGS, *RETAINED, "--ckpt-step", str(iteration))
    assert list(again.steps) == [5, 6]
    for step, row in again.steps.items():
        assert (row["lm_loss"], row["kl"]) == (first.steps[step]["lm_loss"], first.steps[step]["kl"])
    assert newest_complete(saved) == (6, [])  # written anew


def test_every_lost_file_is_noticed(pretrain: Pretraining, tmp_path: Path) -> None:
    pretrain(tmp_path, *FLAGS, "--save-interval", "6")
    saved = tmp_path / "checkpoints"
    checkpoint = saved / "iter_0000006"
    for name in (".metadata", "metadata.json", largest_shard(checkpoint).name):
        moved = checkpoint / name
        moved.rename(tmp_path / "aside")
        with pytest.raises(ConfigError, match=r"no complete checkpoint up to iteration 6 .*is damaged"):
            newest_complete(saved)
        (tmp_path / "aside").rename(moved)
    assert newest_complete(saved) == (6, [])
    assert newest_complete(tmp_path / "nowhere") == (None, [])
    for text in ("six", ""):  # empty: it is written in place
        (saved / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(ConfigError, match=f"holds '{text}' where .* is expected; write 6 there"):
            newest_complete(saved)
    (saved / "latest_checkpointed_iteration.txt").write_text("6")
    (checkpoint / "metadata.json").write_text("")
    with pytest.raises(ConfigError, match=r"iteration 6 is damaged: metadata\.json cannot be read"):
        newest_complete(saved)


@pytest.mark.parametrize("background", [[], BACKGROUND], ids=["waiting", "background"])
def test_the_newest_checkpoints_are_kept(
    pretrain: Pretraining, tmp_path: Path, background: list[str]
) -> None:
    kept = ["--keep-newest-checkpoints", "2", "--save-interval", "1", "--save-retain-interval", "3"]
    pretrain(tmp_path, *FLAGS, "--train-iters", "8", *kept, *background)
    wait_for(lambda: iterations(tmp_path / "checkpoints") == [3, 6, 7, 8], "the old ones' end", 20.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB: room for a checkpoint and a few more."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [[], BACKGROUND], ids=["waiting", "background"])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_in_charge(
    pretrain: Pretraining, tmp_path: Path, small_disk: Path, background: list[str]
) -> None:
    pretrain(tmp_path, *FLAGS, "--save-interval", "2", "--exit-interval", "2")
    status = os.statvfs(small_disk)
    free = status.f_bavail * status.f_bsize
    (small_disk / "ballast").write_bytes(b"x" * (free - 100_000))
    processes = pretrain.start(tmp_path, *FLAGS, "--save-interval", "2", *background)
    run = pretrain.finish(processes, tmp_path)
    assert run.status != 0
    assert "Worker failure" in run.stderr  # Megatron does not say of what
    assert (small_disk / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert newest_complete(small_disk) == (2, [])

    (small_disk / "ballast").unlink()
    pretrain(tmp_path, *FLAGS, "--save-interval", "6")
    assert newest_complete(small_disk) == (6, [])


def test_a_nan_from_the_index_loss_ends_the_run_with_the_status_of_megatrons_rerun_machine(
    pretrain: Pretraining, tmp_path: Path
) -> None:
    poisoned = ["--msa-loss-coeff", "nan", "--save-interval", "1"]
    processes = pretrain.start(tmp_path, *FLAGS, *poisoned)
    run = pretrain.finish(processes, tmp_path)
    assert run.status == 16  # to be tried again elsewhere: is it the hardware?


def test_a_run_ends_with_a_checkpoint_after_its_minutes(pretrain: Pretraining, tmp_path: Path) -> None:
    endless = ["--train-iters", "100000", "--save-interval", "100000"]
    # Counted from the import of Megatron: by the server that forks the run.
    run = pretrain(tmp_path, *FLAGS, *endless, "--exit-duration-in-mins", "1")
    assert newest_complete(tmp_path / "checkpoints") == (max(run.steps), [])
