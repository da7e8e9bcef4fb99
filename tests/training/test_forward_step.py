"""One microbatch: how its loss is reduced, and which batches count."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_msa.data.batch import Batch
from megatron_msa.training import forward_step as module


class RerunMachine:
    """Stands for Megatron's: rejects a loss by raising."""

    def validate_result(
        self, result: Tensor, rejection_func: Callable[[Tensor], bool], message: str, **_: Any
    ) -> None:
        if rejection_func(result):
            raise RuntimeError(message)

    def is_unexpectedly_large(self, result: Tensor, threshold: float, context: str) -> bool:
        return bool(result > threshold)


class Model(nn.Module):
    """Gives back what it was called with; knows its virtual stage."""

    def __init__(self, vp_stage: int | None) -> None:
        super().__init__()
        self.vp_stage = vp_stage

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return (*args, kwargs)


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    args = argparse.Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=False)
    monkeypatch.setattr(module, "get_args", lambda: args)
    monkeypatch.setattr(module, "get_rerun_state_machine", RerunMachine)
    return args


@pytest.fixture
def batches(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch that was taken came from an evaluation."""
    taken: list[bool] = []

    class Timer:
        def start(self) -> None: ...
        def stop(self) -> None: ...

    def get_batch(iterator: Any, args: Any, *, vp_stage: int | None, evaluating: bool) -> Batch:
        taken.append(evaluating)
        return Batch(*(torch.tensor([i]) for i in range(3)), None, torch.tensor([4]), None)

    monkeypatch.setattr(module, "get_timers", lambda: lambda name, log_level=None: Timer())
    monkeypatch.setattr(module, "get_batch", get_batch)
    return taken


def test_the_loss_is_the_sum_over_the_tokens_that_count(args: argparse.Namespace) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    loss, tokens, report = module.loss_func(mask, losses)
    loss.backward()
    assert float(loss) == 37
    assert (tokens.dtype, int(tokens)) == (torch.int, 3)
    assert report["lm loss"].tolist() == [37, 3]
    assert not report["lm loss"].requires_grad
    assert losses.grad is not None
    assert torch.equal(losses.grad, mask)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "found NaN"), (float("inf"), "found Inf")])
def test_a_loss_that_is_no_number_reaches_the_rerun_machine(
    args: argparse.Namespace, value: float, message: str
) -> None:
    loss_func = partial(module.loss_func, torch.ones(1, 2), torch.tensor([[1.0, value]]))
    with pytest.raises(RuntimeError, match=message):
        loss_func()
    args.check_for_nan_in_loss_and_grad = False
    loss_func()


def test_the_rerun_machine_keeps_the_loss_that_megatron_divides_in_place(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(RerunMachine, "validate_result", lambda self, result, **_: kept.append(result))
    loss, *_ = module.loss_func(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]))
    loss /= 2
    assert {float(each) for each in kept} == {4.0}


def test_a_spiky_loss_is_looked_for_where_the_flag_asks(args: argparse.Namespace) -> None:
    loss_func = partial(module.loss_func, torch.ones(1, 1), torch.tensor([[11.0]]))
    loss_func()
    args.check_for_spiky_loss = True
    with pytest.raises(RuntimeError, match="Spiky loss"):
        loss_func()


def test_the_model_gets_the_batch(batches: list[bool]) -> None:
    (tokens, positions, mask, kwargs), _ = module.forward_step(None, Model(None), on_batch=lambda batch: None)
    assert (int(tokens), int(positions), mask) == (0, 4, None)
    assert (int(kwargs["labels"]), int(kwargs["loss_mask"]), kwargs["packed_seq_params"]) == (1, 2, None)


@pytest.mark.parametrize("vp_stage", [None, 0, 1])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_batch_counts_once_and_only_in_training(
    batches: list[bool], vp_stage: int | None, evaluating: bool
) -> None:
    counted: list[Batch] = []
    with torch.set_grad_enabled(not evaluating):
        module.forward_step(None, Model(vp_stage), on_batch=counted.append)
    assert batches == [evaluating]
    assert len(counted) == (not evaluating and vp_stage != 1)
