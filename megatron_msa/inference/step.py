"""One decode step of the model, eager or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.inference.utils as megatron_inference
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_msa.inference.context import CacheContext
from megatron_msa.inference.decode import DecodeBatch


def forward(
    model: GPTModel, tokens: Tensor, context: CacheContext, output: Callable[..., Any] | None = None
) -> Any:
    """Megatron's forward pass over new tokens.

    Args:
        model: in evaluation mode.
        tokens: int64 [t], this rank's.
        context: where they belong.
        output: see `outputs`; None for the logits of all of them.

    Returns:
        What ``output`` returns, or logits [t, padded vocabulary].
    """
    with torch.no_grad(), megatron_inference.InferenceMode.active():
        result = model(
            tokens[None],
            context.positions[None],
            None,
            inference_context=context,
            runtime_gather_output=True,
            output_processor=output,
        )
    return result if output is not None else result[0]


class DecodeStep:
    """Advances every sequence of a batch by one token.

    As a graph the step is captured when it is made: one launch replays it, and nothing of it waits for the
    host. Mixtures of experts then compute every expert on every row, because the number of rows that an
    expert gets would otherwise shape the step.
    """

    def __init__(self, model: GPTModel, batch: DecodeBatch, *, as_graph: bool) -> None:
        self.batch = batch
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if as_graph:
            with all_experts(model):
                self._capture()

    def __call__(self) -> Tensor:
        """Feed ``batch.tokens``: the logits of what follows, [n, padded vocabulary], until the next call."""
        if self._graph is None:
            return self._run()
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def _run(self) -> Tensor:
        self.batch.advance()
        return forward(self._model, self.batch.tokens, self.batch)

    def _capture(self) -> None:
        """All rows are idle meanwhile, so that nothing but the scratch page is written."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and tuned outside the graph
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: a thread of NCCL may ask for the state of its events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._run()
        self._graph = graph


@contextmanager
def all_experts(model: GPTModel) -> Iterator[None]:
    """Within it, every expert gets as many rows as there are: Megatron's padding for decode graphs."""
    experts = model.config.num_moe_experts
    if experts is None:
        yield
        return
    megatron_inference.moe_layer_cache = None  # Megatron keeps the layers of the model that used it last
    factor = rows_for_every_expert(experts, model.config.moe_router_topk)
    megatron_inference.set_decode_expert_padding(model, True, factor)
    try:
        yield
    finally:
        megatron_inference.set_decode_expert_padding(model, False, None)


def rows_for_every_expert(experts: int, topk: int) -> float:
    """The capacity factor with which each expert has room for exactly as many rows as there are tokens."""
    # Megatron rounds tokens * topk / experts * factor up: a last place too much would be one row too many.
    return experts / topk * (1 - 1e-9)
