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
from megatron_msa.phases import Phase


def is_index_parameter(parameter: Tensor) -> bool:
    """Whether a model parameter belongs to an index branch."""
    return getattr(parameter, "is_msa_index_parameter", False)


def is_frozen(parameter: Tensor, phase: Phase) -> bool:
    """Whether the phase leaves this model parameter as it is."""
    return not (phase.trains_index_branch if is_index_parameter(parameter) else phase.trains_backbone)


def set_phase(model: list[nn.Module], phase: Phase) -> None:
    """Let every MSA layer compute what the phase asks for; a frozen backbone also keeps its router biases."""
    for layer in msa_layers(model):
        layer.phase = phase
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "expert_bias"):
                module.frozen_expert_bias = not phase.trains_backbone  # read by Megatron's bias update


class PhaseAwareStep:
    """Replaces `optimizer.step`: parameters that the phase freezes keep their value and their optimizer state.

    Their gradients are zeroed first, so that clipping sees the trained parameters alone, and hidden from the
    inner optimizer, because a zero gradient would still decay weights and moments.
    """

    def __init__(self, model: list[nn.Module], optimizer: MegatronOptimizer) -> None:
        self.model = model
        self.phase: Phase | None = None
        self._step: Callable[[], Any] = optimizer.step
        for megatron_optimizer in _parts(optimizer):
            inner = getattr(megatron_optimizer, "optimizer", None)
            if isinstance(inner, torch.optim.Optimizer):
                inner.register_step_pre_hook(self._hide_frozen(megatron_optimizer))
        optimizer.step = self

    def __call__(self) -> Any:
        if self._freezes():
            for chunk in self.model:
                for parameter in chunk.parameters():
                    gradient = getattr(parameter, "main_grad", None)
                    if gradient is not None and self.phase is not None and is_frozen(parameter, self.phase):
                        gradient.zero_()
        return self._step()

    def _freezes(self) -> bool:
        return self.phase is not None and not (self.phase.trains_backbone and self.phase.trains_index_branch)

    def _hide_frozen(self, megatron_optimizer: MegatronOptimizer) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._freezes():
                for model_parameter, main_parameter in _pairs(megatron_optimizer):
                    if self.phase is not None and is_frozen(model_parameter, self.phase):
                        main_parameter.grad = None

        return hook


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _pairs(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(model parameter, the tensor the inner optimizer updates for it), for each kind of Megatron optimizer."""
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
        groups = [
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    for model_groups, main_groups in groups:
        for model_group, main_group in zip(model_groups, main_groups, strict=True):
            for model_parameter, main_parameter in zip(model_group, main_group, strict=True):
                if main_parameter is not None:
                    yield model_parameter, main_parameter
