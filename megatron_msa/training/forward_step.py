"""One micro-batch: fetch it, run the model, reduce the language-model loss as Megatron expects it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_msa.data.batch import Batch, get_batch

# As in Megatron's own pretraining scripts.
_SPIKY_LOSS_FACTOR = 10
_straggler_timer = StragglerDetector()


def forward_step(
    data_iterator: Iterator[Any] | None,
    model: torch.nn.Module,
    *,
    on_batch: Callable[[Batch], None],
) -> tuple[Tensor, Any]:
    """Megatron's `forward_step_func`.

    Args:
        data_iterator: yields this rank's samples; None on ranks that read no data.
        model: this rank's model chunk, wrapped.
        on_batch: called once per `Batch` that is trained on, for statistics.

    Returns:
        The model's output (per-token losses on the last pipeline stage) and the function that reduces it.
    """
    args, timers = get_args(), get_timers()
    training = torch.is_grad_enabled()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        batch = get_batch(data_iterator, args, vp_stage=vp_stage, evaluating=not training)
    timers("batch-generator").stop()
    if training and not vp_stage:  # every virtual stage of a rank sees the same batches
        on_batch(batch)
    # A text model does not know the argument; without images neither kind needs it.
    visuals = {} if batch.visual_input is None else {"visual_input": batch.visual_input}
    with _straggler_timer:
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed_seq_params,
            **visuals,
        )
    return output, partial(loss_func, batch.loss_mask)


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked token losses, the number of tokens, and what is reported.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output: [b, s] losses in nats.

    Returns:
        (sum of losses, int number of tokens, {"lm loss": [sum, number]}). Megatron divides: by the tokens of
        the microbatch, or by those of the global batch with ``--calculate-per-token-loss``.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    # A copy: Megatron divides the loss in place, and the rerun machine compares it with that of a second run.
    _validate(loss.detach().clone())
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def _validate(loss: Tensor) -> None:
    """Show the loss to Megatron's rerun machine, which repeats a step to tell a fault from a bad loss."""
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for reject, message in ((torch.isnan, "found NaN"), (torch.isinf, "found Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"{message} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        reject = partial(rerun.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss")
        rerun.validate_result(
            result=loss, rejection_func=reject, message="Spiky loss", tolerance=0.0, fatal=False
        )
