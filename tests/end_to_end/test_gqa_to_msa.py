"""A dense GQA checkpoint becomes an MSA model, while it is loaded or by conversion, and training goes on."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.launching import Pretraining, Process, Run

SAVED, END = 3, 5
DENSE = ["--msa-layer-freq", "([0]*2)", "--msa-schedule", "dense@0"]
# Without clipping, which sees the index branch's gradients too, the backbone trains as if it were not there.
# The vocabulary is padded for two tensor-parallel ranks from the start.
FLAGS = ["--train-iters", str(END), "--clip-grad", "0", "--padded-vocab-size", "272"]
FLAGS += ["--adam-eps", "1e-2"]  # with the default a rounding error may become a step of full size
MSA = ["--msa-schedule", "warmup@0"]
DISTRIBUTED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]

Dense = Callable[..., Path]
Started = Callable[..., Run]


@pytest.fixture(scope="module")
def dense(pretrain: Pretraining, tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Checkpoints of a plain GQA model at step 3, one per set of flags."""

    @cache
    def train(*flags: str, processes: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("dense")
        save = ["--save", str(folder), "--save-interval", str(SAVED), "--exit-interval", str(SAVED)]
        pretrain(folder, *FLAGS, *DENSE, *save, *flags, processes=processes)
        return folder

    return train


@pytest.fixture(scope="module")
def started(pretrain: Pretraining, dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Runs that go on from those checkpoints as MSA, one per set of flags."""

    @cache
    def run(*flags: str) -> Run:
        folder = tmp_path_factory.mktemp("started")
        return continued(pretrain, folder, dense(*flags), *MSA, *flags, "--msa-init-index")

    return run


def convert(
    pretrain: Pretraining,
    folder: Path,
    load: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    expect_status: int = 0,
) -> tuple[Path, Process]:
    """Run tools/convert_checkpoint.py gqa-to-msa; returns the target and the process."""
    arguments = ["gqa-to-msa", "--load", str(load), "--save", str(folder / "converted"), *flags]
    name = f"convert{len(list(folder.glob('*')))}"
    process = pretrain.server.start("convert_checkpoint.py", arguments, folder, environment or {}, name)
    assert pretrain.server.wait(process) == expect_status, process.stderr
    return folder / "converted", process


def continued(pretrain: Pretraining, folder: Path, load: Path, *flags: str, processes: int = 1) -> Run:
    run = pretrain(folder, *FLAGS, "--load", str(load), *flags, processes=processes)
    assert list(run.steps) == list(range(SAVED + 1, END + 1))
    return run


def assert_close(run: Run, expected: Run) -> None:
    """Sums in another order, and what two updates make of that."""
    assert run.steps.keys() == expected.steps.keys()
    for step, row in expected.steps.items():
        assert run.steps[step]["lm_loss"] == pytest.approx(row["lm_loss"], rel=1e-6)
        assert run.steps[step]["kl_per_layer"] == pytest.approx(row["kl_per_layer"], rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="fp32", marks=pytest.mark.slow),
        pytest.param(["--bf16"], id="bf16", marks=pytest.mark.slow),
        pytest.param(["--bf16", "--moe-layer-freq", "1"], id="bf16-layers-in-one-tensor"),
        pytest.param(["--bf16", *DISTRIBUTED], id="bf16-distributed"),
        pytest.param(DISTRIBUTED, id="fp32-distributed", marks=pytest.mark.slow),
    ],
)
def test_the_backbone_trains_on_as_if_nothing_had_been_added(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path, flags: list[str]
) -> None:
    expected = continued(pretrain, tmp_path / "dense", dense(*flags), *DENSE, *flags)
    loaded = started(*flags)
    target, _ = convert(pretrain, tmp_path, dense(*flags))
    converted = continued(pretrain, tmp_path / "run", target, *MSA, *flags)

    names = ("lm_loss", "learning_rate", "tokens")
    assert loaded.values(*names) == expected.values(*names)
    assert loaded.values(*names, "kl_per_layer") == converted.values(*names, "kl_per_layer")
    kl = [row["kl"] for row in loaded.steps.values()]
    assert kl[0] > 0
    assert kl[0] != kl[1], "the index branch does not train"


def test_every_initialisation_starts_from_its_own_values(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
) -> None:
    def start(method: str, *flags: str) -> float:
        folder = tmp_path / f"{method}{len(flags)}"
        run = continued(pretrain, folder, dense(*flags), *MSA, *flags, "--msa-init-index", method)
        assert f"initialised 8 tensors of index branches (1,568 parameters, {method})" in run.stdout
        assert run.stdout.count("decoder.layers.{0-1}.self_attention.index_branch.") == 4
        return run.steps[SAVED + 1]["kl"]

    random = start("random")
    assert len({random, start("mean"), started().steps[SAVED + 1]["kl"]}) == 3
    # The distributed optimizer has the parameters in its own buffers, which are loaded.
    assert start("random", *DISTRIBUTED) == pytest.approx(random, rel=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["--pipeline-model-parallel-size", "2"],
    ],
    ids=["tensor-parallel", "pipeline-parallel"],
)
def test_every_layout_initialises_the_same_index_branches(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path, layout: list[str]
) -> None:
    two = continued(pretrain, tmp_path, dense(), *MSA, *layout, "--msa-init-index", processes=2)
    assert_close(two, started())
    assert two.stdout.count("initialised 8 tensors") == 1


def test_data_parallel_ranks_initialise_the_same_index_branches(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
) -> None:
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather"]
    flags = [*MSA, *DISTRIBUTED, *overlap, "--msa-init-index"]
    two = continued(pretrain, tmp_path, dense(*DISTRIBUTED), *flags, processes=2)
    assert_close(two, started(*DISTRIBUTED))


def test_optimizer_states_of_spread_experts_are_kept(
    pretrain: Pretraining, dense: Dense, tmp_path: Path
) -> None:
    """Megatron keeps those of experts apart; here also those of index branches, by their learning rate."""
    spread = ["--expert-model-parallel-size", "2"]
    start = dense(*spread, processes=2)
    expected = continued(pretrain, tmp_path / "dense", start, *DENSE, *spread, processes=2)
    flags = [*MSA, *spread, "--msa-init-index", "--msa-indexer-lr", "1e-2"]
    loaded = continued(pretrain, tmp_path / "loaded", start, *flags, processes=2)
    assert loaded.values("lm_loss") == expected.values("lm_loss")


def test_a_converted_checkpoint_loads_at_another_layout(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
) -> None:
    target, process = convert(pretrain, tmp_path, dense(), "--verify", "--verify-tokens", "40")
    assert "largest difference of a logit 0.00e+00" in process.stdout
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert_close(continued(pretrain, tmp_path / "two", target, *MSA, *layout, processes=2), started())


def test_the_optimizer_state_can_be_dropped(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
) -> None:
    target, _ = convert(pretrain, tmp_path, dense(), "--drop-optimizer")
    refused = pretrain(tmp_path / "refused", *FLAGS, *MSA, "--load", str(target), expect_status=2)
    assert "has no optimizer state; add --no-load-optim" in refused.stderr
    fresh = ["--no-load-optim"]
    loaded = continued(pretrain, tmp_path / "a", dense(), *MSA, *fresh, "--msa-init-index")
    dropped = continued(pretrain, tmp_path / "b", target, *MSA, *fresh)
    assert dropped.values("lm_loss", "kl") == loaded.values("lm_loss", "kl")
    assert dropped.steps[END]["lm_loss"] != started().steps[END]["lm_loss"]
    size = [sum(file.stat().st_size for file in folder.rglob("*.distcp")) for folder in (target, dense())]
    assert size[0] < 0.6 * size[1]


@pytest.mark.slow
def test_some_layers_can_stay_dense(pretrain: Pretraining, dense: Dense, tmp_path: Path) -> None:
    stack = ["--moe-layer-freq", "1"]
    pattern = [*MSA, *stack, "--msa-layer-freq", "[0,1]"]
    expected = continued(pretrain, tmp_path / "dense", dense(*stack), *DENSE, *stack)
    loaded = continued(pretrain, tmp_path / "loaded", dense(*stack), *pattern, "--msa-init-index")
    target, _ = convert(pretrain, tmp_path, dense(*stack), "--msa-layer-freq", "[0,1]")
    converted = continued(pretrain, tmp_path / "run", target, *pattern)
    assert loaded.values("lm_loss") == expected.values("lm_loss")
    assert loaded.values("lm_loss", "kl_per_layer") == converted.values("lm_loss", "kl_per_layer")
    assert loaded.steps[END]["kl_per_layer"].keys() == {"2"}


def test_the_index_branch_may_get_its_own_learning_rate(
    pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
) -> None:
    own = ["--msa-init-index", "--msa-indexer-lr", "1e-2"]
    run = continued(pretrain, tmp_path, dense(), *MSA, *own)
    assert run.values("lm_loss") == started().values("lm_loss")
    assert run.steps[SAVED + 1]["kl"] == started().steps[SAVED + 1]["kl"]
    assert run.steps[END]["kl"] != started().steps[END]["kl"]


class TestStrictness:
    def test_without_the_flag_a_missing_index_branch_is_an_error_that_names_it(
        self, pretrain: Pretraining, dense: Dense, tmp_path: Path
    ) -> None:
        run = pretrain(tmp_path, *FLAGS, *MSA, "--load", str(dense()), expect_status=2)
        assert "has no index branch: it is a dense model. Add --msa-init-index" in run.stderr

    def test_an_index_branch_that_is_there_is_loaded(
        self, pretrain: Pretraining, dense: Dense, started: Started, tmp_path: Path
    ) -> None:
        flags = [*FLAGS, *MSA, "--save", "own", "--save-interval", "1", "--msa-init-index"]
        pretrain(tmp_path, *flags, "--load", str(dense()), "--exit-interval", str(SAVED + 1))
        run = pretrain(tmp_path, *flags, "random", "--load", "own")
        assert "has its index branches, which are loaded as they are" in run.stdout
        assert run.values("lm_loss", "kl") == started().values("lm_loss", "kl")

    def test_a_checkpoint_to_start_from_is_required(self, pretrain: Pretraining, tmp_path: Path) -> None:
        run = pretrain(tmp_path, *FLAGS, *MSA, "--load", "nowhere", "--msa-init-index", expect_status=2)
        assert "there is no checkpoint in --load nowhere" in run.stderr

    def test_any_other_missing_tensor_is_an_error(
        self, pretrain: Pretraining, dense: Dense, tmp_path: Path
    ) -> None:
        flags = ["--msa-init-index", "--add-qkv-bias"]
        run = pretrain(tmp_path, *FLAGS, *MSA, "--load", str(dense()), *flags, expect_status=1)
        assert "besides index branches, and only those are initialised" in run.stderr
        assert "decoder.layers.0.self_attention.linear_qkv.bias" in run.stderr

    def test_a_format_that_cannot_be_extended_is_refused_with_both_ways_on(
        self, pretrain: Pretraining, dense: Dense, tmp_path: Path
    ) -> None:
        flags = DISTRIBUTED[:-1]
        start = dense(*flags)
        flags = [*flags, "--msa-init-index"]
        run = pretrain(tmp_path, *FLAGS, *MSA, "--load", str(start), *flags, expect_status=2)
        assert "in the format dp_reshardable" in run.stderr
        assert "--dist-ckpt-optim-fully-reshardable" in run.stderr
        assert "--no-load-optim" in run.stderr
        continued(pretrain, tmp_path / "fresh", start, *MSA, *flags, "--no-load-optim")
        _, process = convert(pretrain, tmp_path, start, expect_status=2)
        assert "convert with --drop-optimizer" in process.stderr


def test_an_interrupted_conversion_leaves_no_target_and_the_source_as_it_was(
    pretrain: Pretraining, dense: Dense, tmp_path: Path
) -> None:
    def digest() -> str:
        files = sorted(path for path in dense().rglob("iter*/*") if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    before = digest()
    target = tmp_path / "converted"
    variables = {"DIE_BEFORE_RENAMING_TO": str(target)}
    convert(pretrain, tmp_path, dense(), environment=variables, expect_status=-9)
    assert not target.exists()
    assert (tmp_path / ".converted.incomplete").is_dir(), "it was not interrupted in the middle"
    convert(pretrain, tmp_path, dense())
    continued(pretrain, tmp_path / "run", target, *MSA)
    assert digest() == before
    assert not (tmp_path / ".converted.incomplete").exists()
    _, process = convert(pretrain, tmp_path, dense(), expect_status=2)
    assert "exists; choose another folder" in process.stderr
