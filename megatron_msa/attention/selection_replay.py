"""Full activation recomputation replays the selection of the first forward pass; it never selects anew.

Recomputation runs a stretch of layers a second time, in the backward pass. Chosen again there, the blocks
could be others, through noise in the index scores (16-bit rounding, another reduction order), and the
gradients would be those of a function that was never evaluated; choosing also costs time.

Each call of Megatron's checkpoint function keeps the selections of its own first pass and hands them out
again. Whatever runs in between (other microbatches, other pipeline stages, an evaluation) makes calls of its
own, so there is no key that could be mistaken; and what is kept lives as long as the call, whose owner is the
autograd graph: a graph that is dropped, for example after an exception, takes its selections along.

What is kept is a `BlockSelection`: 4 k bytes per token and GQA group of this rank, layer and microbatch in
flight (k = 16, 2 groups, 32,768 tokens: 4 MiB). Selective recomputation keeps the same, as inputs of
the core attention that it checkpoints.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from megatron.core import recompute, tensor_parallel
from megatron.core.extensions import transformer_engine
from msa_kernels import BlockSelection

Select = Callable[[], BlockSelection]


class _Thread(threading.local):
    """The pass that a thread is in; recomputation runs in a thread of autograd."""

    take: Callable[[Select], BlockSelection] = staticmethod(lambda select: select())


_thread = _Thread()


def selected_once(select: Select) -> BlockSelection:
    """What ``select()`` returns; in a recomputed forward pass what it returned in the first, without a call.

    A layer must ask in both passes, or in neither.
    """
    return _thread.take(select)


def install() -> None:
    """Make Megatron's checkpoint functions replay. May be called more than once."""
    for module, name in (
        (tensor_parallel, "checkpoint"),
        (recompute, "te_checkpoint"),  # 8-bit training; None without Transformer Engine
        (transformer_engine, "te_checkpoint"),  # the same, where multi-token prediction looks it up
    ):
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, "_replays_selections"):
            setattr(module, name, _replaying(function))


def _replaying(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checkpoint)
    def wrapper(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(_Stretch(function), *args, **kwargs)

    wrapper._replays_selections = True  # type: ignore[attr-defined]
    return wrapper


class _Stretch:
    """The function of one checkpoint call: its first pass records the selections, later ones replay them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._selections: list[BlockSelection] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = _thread.take  # of a stretch that contains this one, and may itself be replaying
        recorded: list[BlockSelection] = []
        saved = iter(self._selections or ())

        def record(select: Select) -> BlockSelection:
            recorded.append(outer(select))
            return recorded[-1]

        def replay(select: Select) -> BlockSelection:
            return next(saved)

        _thread.take = record if self._selections is None else replay
        try:
            result = self._function(*args, **kwargs)
        finally:
            _thread.take = outer
        if self._selections is None:
            self._selections = recorded
        return result
