"""Applies a phase to a model and its optimizer: what the layers compute, and what the update may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor, nn

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.phases import Phase, PhaseSchedule

NOTABLE_EXCESS = 1.5
"""Updates this many times too large are worth a warning."""


def is_index_parameter(parameter: Tensor) -> bool:
    """Whether a model parameter belongs to an index branch."""
    return getattr(parameter, "is_msa_index_parameter", False)


def is_frozen(parameter: Tensor, phase: Phase) -> bool:
    """Whether the phase leaves this model parameter as it is."""
    return not (phase.trains_index_branch if is_index_parameter(parameter) else phase.trains_backbone)


def freezes(phase: Phase) -> bool:
    """Whether the phase leaves any parameter as it is."""
    return not (phase.trains_index_branch and phase.trains_backbone)


def set_phase(model: list[nn.Module], phase: Phase) -> None:
    """Let every MSA layer compute what the phase asks for; a frozen backbone also keeps its router biases."""
    for layer in msa_layers(model):
        layer.phase = phase
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.frozen_expert_bias = not phase.trains_backbone  # read by Megatron's bias update


class PhaseAwareStep:
    """Replaces `optimizer.step`: parameters that the phase freezes keep their value and their moments.

    Their gradients are zeroed first, so that clipping sees the trained parameters alone, and hidden from the
    inner optimizer, because a zero gradient would still decay weights and moments. Their Adam step count
    advances with that of the others, because a Megatron checkpoint holds one count for all parameters.
    """

    def __init__(self, model: list[nn.Module], optimizer: MegatronOptimizer) -> None:
        self.model = model
        self.phase: Phase | None = None
        self._step: Callable[[], Any] = optimizer.step
        for megatron_optimizer in optimizer_parts(optimizer):
            inner = getattr(megatron_optimizer, "optimizer", None)
            if isinstance(inner, torch.optim.Optimizer):  # a rank without parameters has none
                inner.register_step_pre_hook(self._hide_frozen(megatron_optimizer))
        optimizer.step = self

    def __call__(self) -> Any:
        if self.phase is not None and freezes(self.phase):
            for chunk in self.model:
                for parameter in chunk.parameters():
                    gradient = getattr(parameter, "main_grad", None)
                    if gradient is not None and is_frozen(parameter, self.phase):
                        gradient.zero_()
        return self._step()

    def _hide_frozen(self, megatron_optimizer: MegatronOptimizer) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.phase is None or not freezes(self.phase):
                return
            _complete_state(megatron_optimizer)
            for model_parameter, main_parameter in parameter_pairs(megatron_optimizer):
                if is_frozen(model_parameter, self.phase):
                    main_parameter.grad = None
                    if hasattr(main_parameter, "decoupled_grad"):  # of the precision-aware optimizer
                        main_parameter.decoupled_grad = None
                    state = megatron_optimizer.optimizer.state[main_parameter]
                    if "step" in state:  # torch's Adam counts per parameter, FusedAdam per group
                        state["step"] += 1

        return hook


def largest_excess(beta1: float, beta2: float) -> float:
    """How many times too large Adam's first updates get without bias correction: see `late_start_warning`."""
    return max((1 - beta1**t) / (1 - beta2**t) ** 0.5 for t in range(1, 200))


def late_start_warning(schedule: PhaseSchedule, *, beta1: float, beta2: float) -> str | None:
    """A warning if parameters that start to train late would take much larger steps than meant, else None.

    Their moments start at zero when the step count, which all parameters share, is far from it. Adam's bias
    correction is then missing: after t steps the update is (1 - beta1^t) / sqrt(1 - beta2^t) times as large.
    """
    first = schedule.phases[0]
    if not freezes(first):
        return None
    part, trains = (
        ("index branch", "trains_index_branch") if first.trains_backbone else ("backbone", "trains_backbone")
    )
    starts = [s for p, s in zip(schedule.phases, schedule.starts, strict=True) if getattr(p, trains)]
    excess = largest_excess(beta1, beta2)
    if not starts or excess < NOTABLE_EXCESS:
        return None
    return (
        f"the {part} starts to train at {starts[0]:,} {schedule.unit} without Adam's bias correction: with "
        f"--adam-beta1 {beta1} --adam-beta2 {beta2} its first updates are up to {excess:.1f} times too "
        "large; consider --adam-beta2 0.95"
    )


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that one of several is made of (dense and expert parameters, model chunks)."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _complete_state(optimizer: MegatronOptimizer) -> None:
    """Create the state that parameters get with their first update: a checkpoint must hold it for all."""
    if optimizer.init_state_fn is not None:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.optimizer.state[parameter].setdefault("step", torch.tensor(0.0))


def parameter_pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(model parameter, the tensor that the inner optimizer updates for it), per kind of optimizer."""
    if isinstance(optimizer, FP32Optimizer):
        for group in optimizer.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    else:  # DistributedOptimizer: this rank's shards
        # The precision-aware optimizer keeps the fp32 copies to itself and is handed the 16-bit shards.
        has_copies = not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        shards = optimizer.shard_fp32_from_float16_groups if has_copies else optimizer.shard_float16_groups
        groups = [
            (optimizer.model_float16_groups, shards),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    for model_groups, main_groups in groups:
        for model_group, main_group in zip(model_groups, main_groups, strict=True):
            yield from zip(model_group, main_group, strict=True)
