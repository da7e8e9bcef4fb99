"""How long the vision encoder takes of a step: marks around its forward and its part of the backward pass.

On a GPU the marks are events in the stream, so nothing waits for them before a row is logged; without one
they are readings of the host's clock. Projector and patch merge are part of it, and so are forward passes
that the backward pass repeats (recomputation). A rank that has nothing to encode takes the time of its blank
token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_msa.model.multimodal import MultimodalGPT


class EncoderTime:
    """Measures the encoder of this process; a pipeline stage without one reports zero.

    Args:
        model: the chunks of this rank, in Megatron's wrappers.
    """

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self._marks: list[Any] = []
        """Alternately a begin and an end; forward and backward passes do not nest."""
        for chunk in model:
            language = unwrap_model(chunk)
            if isinstance(language, MultimodalGPT) and language.vision_model is not None:
                self._attach(language.vision_model)

    def saved(self) -> list[Any]:
        """The marks so far, for `restore`."""
        return [*self._marks]

    def restore(self, saved: list[Any]) -> None:
        """Forget what was marked since."""
        self._marks = [*saved]

    def seconds_per_step(self, steps: int, device: torch.device | int | str) -> float:
        """Of the rank that took longest, since the last call. Collective; waits for the device.

        Args:
            steps: since the last call.
            device: of the maximum.
        """
        if self._marks and isinstance(self._marks[-1], torch.cuda.Event):
            self._marks[-1].synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        seconds = sum(_between(begin, end) for begin, end in pairs)
        self._marks = []
        longest = torch.tensor(seconds, device=device, dtype=torch.float64)
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        return float(longest) / steps

    def _attach(self, encoder: nn.Module) -> None:
        encoder.register_forward_pre_hook(self._before_forward)
        encoder.register_forward_hook(self._after_forward)
        # Of the parameters that train, the first one gets its gradient last.
        first = next(each for each in encoder.parameters() if each.requires_grad)
        first.register_post_accumulate_grad_hook(self._mark)

    def _before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():  # not in an evaluation
            self._mark()

    def _after_forward(self, encoder: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._mark()
            output.register_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())


def _between(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
