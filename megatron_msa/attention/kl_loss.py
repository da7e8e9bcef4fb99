"""Attaches the KL alignment loss of a layer to its output.

The loss is a real number that is added to the objective without touching the forward values: the output
passes through unchanged, and the backward pass starts the loss's own gradient with the scale that Megatron
gives to auxiliary losses. Megatron's schedules set that scale before every backward pass, through
``config.experimental_attention_variant_loss_scale_func``:

- default: loss scale * context-parallel size / number of microbatches; gradients are then averaged over
  DP x CP, so each rank contributes its rows divided by the GLOBAL rows of the microbatch;
- ``--calculate-per-token-loss``: the loss scale alone; gradients are summed and later divided by the number
  of tokens whose loss counts, so each rank contributes the plain sum over its rows. Rows have a KL whether or
  not their loss counts: with masked tokens the KL weighs more by rows / counted tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LossScale:
    """The scale of the next backward pass: a tensor of one element, or 1 before Megatron has set it."""

    value: Tensor | None = None


def set_loss_scale(scale: Tensor) -> None:
    """Called by Megatron's schedules; ``scale`` holds one element."""
    _LossScale.value = scale.detach()


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        scale = _LossScale.value
        if scale is None:
            scale = torch.ones(1)
        return grad_outputs[0], scale.to(device=ctx.loss_device, dtype=ctx.loss_dtype).reshape(())


def attach_loss(output: Tensor, loss: Tensor) -> Tensor:
    """Return ``output`` unchanged; its backward pass also back-propagates ``loss`` (a scalar)."""
    return _AttachLoss.apply(output, loss)


def kl_objective(
    kl_rows: Tensor, *, coefficient: float, num_groups: int, per_token: bool, context_parallel_size: int
) -> Tensor:
    """lambda * (1 / (N H_kv)) * sum of the rows' KL; without the 1/N when Megatron divides by tokens itself.

    Args:
        kl_rows: [rows of this rank, GQA groups of this rank], KL(P || Q) in nats.
        num_groups: H_kv over all tensor-parallel ranks.
        per_token: ``config.calculate_per_token_loss``.
        context_parallel_size: N is the rows of this rank times this.
    """
    total = kl_rows.sum() * (coefficient / num_groups)
    return total if per_token else total / (kl_rows.shape[0] * context_parallel_size)
