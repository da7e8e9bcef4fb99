"""What a phase freezes stays as it is, to the last bit, whatever the optimizer; everything else trains."""

import re
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.phases import Phase, PhaseSchedule
from megatron_msa.training.phase_control import PhaseAwareStep, late_start_warning, set_phase
from tests.training.tiny_msa import OPTIMIZERS, build_model, build_optimizer, training_step

pytestmark = pytest.mark.usefixtures("process_groups")

Snapshot = dict[str, dict[str, Tensor]]


class Trained:
    """A model with its optimizer under phase control."""

    def __init__(self, *, clip_grad: float = 1.0, **kind: bool) -> None:
        self.model: list[nn.Module] = build_model(**kind)
        self.optimizer: MegatronOptimizer = build_optimizer(self.model, clip_grad=clip_grad, **kind)
        self.step = PhaseAwareStep(self.model, self.optimizer)

    def train(self, phase: Phase, steps: int = 1) -> float:
        """Train in a phase; returns the last gradient norm."""
        set_phase(self.model, phase)
        self.step.phase = phase
        return [training_step(self.model, self.optimizer) for _ in range(steps)][-1]

    def snapshot(self) -> Snapshot:
        """Name of each parameter -> its value, what the optimizer keeps of it, and its step count."""
        result = {}
        for name, parameter in self.model[0].named_parameters():
            states = self._states(parameter)
            assert {"exp_avg", "exp_avg_sq"} <= set(states), f"a checkpoint would miss the state of {name}"
            result[name] = {"value": parameter.detach().clone()}
            result[name] |= {key: state.detach().clone() for key, state in states.items()}
        return result

    def _states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        optimizer: Any = self.optimizer
        if isinstance(optimizer, ChainedOptimizer):
            (optimizer,) = optimizer.chained_optimizers
        if isinstance(optimizer, DistributedOptimizer):
            return optimizer._get_main_param_and_optimizer_states(parameter)
        main = getattr(parameter, "main_param", parameter)
        return {"param": main, **optimizer.optimizer.state[main]}


@pytest.fixture(params=OPTIMIZERS)
def trained(request: pytest.FixtureRequest) -> Trained:
    trained = Trained(**OPTIMIZERS[request.param])
    parts = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
    assert [type(part).__name__ for part in parts] == [request.param.split("-")[0]]
    return trained


def is_index(name: str) -> bool:
    return ".index_branch." in name


def changed(before: Snapshot, after: Snapshot, key: str) -> set[str]:
    return {name for name in before if not torch.equal(before[name][key], after[name][key])}


def assert_only_these_trained(trained: Trained, before: Snapshot, names: set[str]) -> None:
    after = trained.snapshot()
    for key in ("value", "param", "exp_avg", "exp_avg_sq"):
        assert changed(before, after, key) == names, key
    # Megatron stores one step count for all parameters, so the frozen ones must keep pace.
    assert len({float(states["step"]) for states in after.values()}) == 1


@pytest.mark.parametrize("phase", list(Phase))
def test_a_phase_trains_its_parameters_and_leaves_the_others_and_their_adam_state(
    trained: Trained, phase: Phase
) -> None:
    trained.train(Phase.WARMUP, steps=2)
    before = trained.snapshot()
    trained.train(phase, steps=2)
    trains = {True: phase.trains_index_branch, False: phase.trains_backbone}
    assert_only_these_trained(trained, before, {name for name in before if trains[is_index(name)]})


@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.INDEX_ONLY])
def test_what_a_first_phase_freezes_trains_in_the_next_one(trained: Trained, phase: Phase) -> None:
    start = {name: parameter.detach().clone() for name, parameter in trained.model[0].named_parameters()}
    trained.train(phase, steps=2)
    frozen = trained.snapshot()
    for name, states in frozen.items():
        if is_index(name) == phase.trains_backbone:
            assert torch.equal(states["value"], start[name])
            assert not states["exp_avg"].any()
    assert {float(states["step"]) for states in frozen.values()} == {2}
    trained.train(Phase.SPARSE)
    assert_only_these_trained(trained, frozen, set(frozen))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("phase", [Phase.INDEX_ONLY, Phase.DENSE])
def test_the_gradient_norm_counts_the_trained_parameters_alone(kind: str, phase: Phase) -> None:
    trained = Trained(clip_grad=1e9, **OPTIMIZERS[kind])  # computes the norm, but does not scale by it
    norm = trained.train(phase)
    squares: dict[bool, float] = {True: 0.0, False: 0.0}
    for name, parameter in trained.model[0].named_parameters():
        squares[is_index(name)] += float(parameter.main_grad.double().square().sum())
    assert squares[phase.trains_backbone] == 0  # of what is frozen
    assert norm == pytest.approx(squares[not phase.trains_backbone] ** 0.5, rel=1e-6)
    assert norm > 0


def test_frozen_gradients_do_not_tighten_the_clipping_of_the_others() -> None:
    moments = []
    for scale in (1.0, 100.0):
        trained = Trained(clip_grad=0.1)
        with torch.no_grad():  # the language model's gradients grow, those of the KL do not
            trained.model[0].get_parameter("module.output_layer.weight").mul_(scale)
        trained.train(Phase.INDEX_ONLY)
        states = trained.snapshot()
        moments.append({name: states[name]["exp_avg"] for name in states if is_index(name)})
    for name, moment in moments[0].items():
        assert torch.equal(moment, moments[1][name])


def test_router_biases_move_with_the_backbone_and_only_with_it() -> None:
    trained = Trained()
    (bias,) = (b for name, b in trained.model[0].named_buffers() if name.endswith("expert_bias"))
    for phase in (Phase.INDEX_ONLY, Phase.WARMUP, Phase.INDEX_ONLY, Phase.DENSE, Phase.SPARSE):
        before = bias.clone()
        trained.train(phase)
        assert torch.equal(before, bias) == (not phase.trains_backbone), phase


def test_every_msa_layer_learns_its_phase() -> None:
    trained = Trained()
    set_phase(trained.model, Phase.SPARSE)
    assert [layer.phase for layer in msa_layers(trained.model)] == [Phase.SPARSE] * 2


@pytest.mark.parametrize(
    ("schedule", "beta2", "expected"),
    [
        ("warmup@0,sparse@9", 0.999, None),
        ("dense@0,warmup@9", 0.999, r"index branch starts to train at 9 iterations .* up to 6\.6 times"),
        ("index_only@0,sparse@2Mtok", 0.999, r"backbone starts to train at 2,000,000 tokens"),
        ("index_only@0,sparse@9", 0.95, None),
        ("dense@0", 0.999, None),
    ],
)
def test_parameters_that_start_late_without_bias_correction_are_warned_about(
    schedule: str, beta2: float, expected: str | None
) -> None:
    warning = late_start_warning(PhaseSchedule.parse(schedule), beta1=0.9, beta2=beta2)
    if expected is None:
        assert warning is None
    else:
        assert warning is not None
        assert re.search(expected, warning)
