"""Megatron's training loop without a GPU: it trains, resumes exactly, and is the same in every layout."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_msa.training import megatron_fixes, no_gpu
from tests.helpers import launch

TINY_GPT = "tests/training/tiny_gpt.py"
SIX_STEPS = ["--train-iters", "6", "--save-interval", "3", "--ckpt-format", "torch_dist"]
PRECISIONS_AND_OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer"],
    "bf16": ["--bf16"],
    "bf16_distributed": ["--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
}
# Only the weights of the third step, so that any layout can load them; tensor parallelism must not pad the
# vocabulary to another size.
ONLY_WEIGHTS = ["--no-load-optim", "--no-load-rng", "--make-vocab-size-divisible-by", "64"]
LAYOUTS = {
    "tensor_and_sequence_parallel": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pipeline_parallel": ["--pipeline-model-parallel-size", "2"],
    "expert_parallel": ["--expert-model-parallel-size", "2"],
    "averaging_collectives": [
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--ddp-average-in-collective",
    ],
}


class Run(NamedTuple):
    """One call of pretrain()."""

    steps: list[dict[str, Any]]  # iteration, loss, gradient norm
    parameters: str  # digest of the last rank's final parameters

    @property
    def losses(self) -> list[float]:
        return [step["lm loss"] for step in self.steps]

    @classmethod
    def read(cls, folder: Path, name: str) -> "Run":
        return cls(**json.loads((folder / f"{name}.json").read_text()))


def several(runs: list[list[str | Path]]) -> list[str | Path]:
    """The command line of tiny_gpt.py for several runs in one process."""
    return [argument for index, run in enumerate(runs) for argument in (["--then", *run] if index else run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole_runs(folder: Path) -> Path:
    """Six steps in one go, with checkpoints after the third and the sixth."""
    runs: list[list[str | Path]] = []
    for name, flags in PRECISIONS_AND_OPTIMIZERS.items():
        checkpoints = folder / f"{name}_checkpoints"
        runs.append(["--result-file", folder / f"{name}.json", "--save", checkpoints, *SIX_STEPS, *flags])
    launch(TINY_GPT, *several(runs))
    return folder


@pytest.fixture(scope="module")
def resumed_runs(whole_runs: Path) -> Path:
    """A new process goes on from the third step; its last run is killed in the middle of saving the sixth."""
    folder = whole_runs
    for name in PRECISIONS_AND_OPTIMIZERS:
        for copy in ("resumed", "killed") if name == "plain" else ("resumed",):
            checkpoints = folder / f"{name}_{copy}_checkpoints"
            shutil.copytree(folder / f"{name}_checkpoints" / "iter_0000003", checkpoints / "iter_0000003")
            (checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    runs: list[list[str | Path]] = []
    for name, flags in PRECISIONS_AND_OPTIMIZERS.items():
        checkpoints = folder / f"{name}_resumed_checkpoints"
        result = folder / f"{name}_resumed.json"
        runs.append(["--result-file", result, "--load", checkpoints, *SIX_STEPS, *flags])
    weights = folder / "plain_resumed_checkpoints"
    runs.append(
        ["--result-file", folder / "one_process.json", "--load", weights, *SIX_STEPS[:2], *ONLY_WEIGHTS]
    )
    killed = folder / "plain_killed_checkpoints"
    runs.append(["--load", killed, "--save", killed, "--die-while-saving", "6", *SIX_STEPS])
    launch(TINY_GPT, *several(runs), expect_failure=True)
    return folder


@pytest.fixture(scope="module")
def two_process_runs(resumed_runs: Path) -> Path:
    """Two processes: data parallel from the start, the other layouts from the weights of the third step."""
    folder = resumed_runs
    runs: list[list[str | Path]] = [
        ["--result-file", folder / "data_parallel.json", *SIX_STEPS[:2], "--use-distributed-optimizer"]
    ]
    weights = folder / "plain_resumed_checkpoints"
    for name, flags in LAYOUTS.items():
        runs.append(
            [
                "--result-file",
                folder / f"{name}.json",
                "--load",
                weights,
                *SIX_STEPS[:2],
                *ONLY_WEIGHTS,
                *flags,
            ]
        )
    launch(TINY_GPT, *several(runs), processes=2)
    return folder


def test_it_trains_and_the_loss_falls(whole_runs: Path) -> None:
    for name in PRECISIONS_AND_OPTIMIZERS:
        losses = Run.read(whole_runs, name).losses
        assert len(losses) == 6
        assert all(0 < loss < 10 for loss in losses)  # also false for NaN
        assert losses[-1] < losses[0] - 0.5


def test_the_distributed_optimizer_equals_the_plain_one(whole_runs: Path) -> None:
    plain, distributed = Run.read(whole_runs, "plain"), Run.read(whole_runs, "distributed")
    assert distributed.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("name", PRECISIONS_AND_OPTIMIZERS)
def test_a_resumed_run_equals_the_whole_run_bit_for_bit(name: str, resumed_runs: Path) -> None:
    whole, resumed = Run.read(resumed_runs, name), Run.read(resumed_runs, f"{name}_resumed")
    assert resumed.steps == whole.steps[3:]
    assert resumed.parameters == whole.parameters


def test_a_save_that_is_cut_off_leaves_the_last_good_checkpoint(resumed_runs: Path) -> None:
    checkpoints = resumed_runs / "plain_killed_checkpoints"
    assert (checkpoints / "iter_0000006").is_dir()  # it had begun
    assert not (checkpoints / "iter_0000006" / ".metadata").exists()
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.slow  # a minute; tests/parallel has the same layouts with MSA
def test_data_parallel_equals_one_process(two_process_runs: Path) -> None:
    one, two = Run.read(two_process_runs, "distributed"), Run.read(two_process_runs, "data_parallel")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout: str, two_process_runs: Path) -> None:
    one, two = Run.read(two_process_runs, "one_process"), Run.read(two_process_runs, layout)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    norms = [[step["grad_norm"] for step in run.steps] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_written_in_the_background(tmp_path: Path) -> None:
    flags = ["--async-save", "--use-persistent-ckpt-worker", "--tensorboard-dir", tmp_path / "tensorboard"]
    logging = ["--log-throughput", "--log-memory-to-tensorboard", "--log-progress", "--log-straggler"]
    output = launch(TINY_GPT, *SIX_STEPS, "--save", tmp_path, *flags, *logging)
    assert "successfully saved checkpoint from iteration       6" in output
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_nothing_is_installed_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_gpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def replaceable() -> list[Any]:
        return [torch.zeros, torch.Tensor.to, torch.cuda.Stream, torch.distributed.all_reduce, torch.compile]

    before = replaceable()
    assert no_gpu.install_if_no_gpu() is False
    assert replaceable() == before


@pytest.fixture(scope="module")
def stand_ins() -> None:
    if not no_gpu.install_if_no_gpu():
        pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("stand_ins")
class TestStandIns:
    def test_installing_twice_changes_nothing(self) -> None:
        before = torch.zeros, torch.Tensor.to, torch.cuda.is_available
        assert no_gpu.install_if_no_gpu() is True
        assert (torch.zeros, torch.Tensor.to, torch.cuda.is_available) == before

    def test_only_megatrons_start_hears_of_a_gpu(self) -> None:
        answer = "answer = torch.cuda.is_available(), torch.cuda.device_count()"
        for asker, expected in [("triton.runtime", (False, 0)), ("megatron.training.initialize", (True, 1))]:
            namespace: dict[str, Any] = {"torch": torch, "__name__": asker}
            exec(answer, namespace)
            assert namespace["answer"] == expected
        assert not torch.accelerator.is_available()

    def test_tensors_for_the_gpu_are_on_the_cpu(self) -> None:
        device = torch.cuda.current_device()
        tensors = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda:0")),
            torch.empty(3, device=device, pin_memory=True),
            torch.zeros(2).to(device),
            torch.zeros(2).to("cuda", non_blocking=True),
            torch.zeros(2).to(device="cuda", dtype=torch.bfloat16),
            torch.zeros_like(torch.zeros(2), device="cuda"),
            torch.zeros(2).new_zeros(3, device="cuda"),
            torch.zeros(2).cuda(non_blocking=True),
            torch.zeros(2).pin_memory(),
            torch.nn.Linear(2, 2).cuda(device).weight,
            torch.nn.Linear(2, 2).to("cuda").weight,
        ]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}

    def test_other_calls_do_what_torch_does(self) -> None:
        assert torch.zeros(2, 3, dtype=torch.int8).shape == (2, 3)
        assert torch.full((2,), 7).tolist() == [7, 7]
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.zeros(2).to(torch.float64).dtype == torch.float64
        assert torch.zeros(2).to(torch.ones(1, dtype=torch.int32)).dtype == torch.int32
        assert torch.zeros(2).type() == "torch.FloatTensor"
        assert torch.zeros(2).type(torch.float64).dtype == torch.float64

    def test_events_measure_milliseconds(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda.current_stream().record_event(end)
        assert 0 <= start.elapsed_time(end) < 1000

    def test_both_generators_are_one(self) -> None:
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)

    def test_the_dataset_helper_is_not_compiled(self) -> None:
        megatron_fixes.apply()
        from megatron.core.datasets.utils import compile_helpers

        compile_helpers()  # unpatched, this ends the process: the wheel has no Makefile
