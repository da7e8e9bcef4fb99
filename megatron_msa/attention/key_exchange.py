"""Keys of all context-parallel ranks, brought to every rank, and their gradients brought back.

One `KeyExchange` carries the tensors that have a row per key (k, v, index_k) of one layer and microbatch:

    forward     send, start   starts an all-gather of this rank's keys, and lets other work go on
                receive       waits for it and puts the keys into global order
    backward    receive       starts one reduce-scatter of the gradients of all keys
                send          waits for it

Autograd runs nodes that were created late first, so whatever is computed between `send` and `receive` in the
forward pass (rotary embeddings of the queries, scores and top-k) runs beside the communication, and the
backward pass of the same nodes runs beside the communication back.

What travels together goes in one collective. With CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron asks for, a
second collective that waits for the first would hold up every kernel that is launched after it.

The gathered keys are not kept for the backward pass, which would cost every layer the keys of the whole
sequence. Inside `kept_as_shards` autograd saves a note in their place, and reading it gathers them again;
`prefetched_in_backward` starts that gather ahead of the need.

Gradients are summed in fp32 (fp64 for fp64 tensors): in 16 bit a sum over C ranks would round C - 1 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_msa.attention.context_parallel import TokenLayout


@dataclass
class _InFlight:
    """A collective that runs: its result may be read after ``work.wait()``."""

    result: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


class KeyExchange:
    """Tensors [T / C, ...] of this rank, in the order of its tokens, to and from [T, ...] in global order.

    All have one dtype. Every rank of the group must use its exchanges in the same order. Not for groups of a
    single rank.
    """

    def __init__(self, layout: TokenLayout, group: torch.distributed.ProcessGroup) -> None:
        self._layout = layout
        self._group = group
        self._local: list[Tensor] = []
        self._gathers: list[tuple[list[int], _InFlight]] = []
        """Numbers of tensors that are on their way together; [T, elements of their rows], rank after rank."""
        self._all: dict[int, Tensor] = {}
        """Gathered keys by number, while they are needed again soon."""
        self._storage: dict[int, int] = {}
        """Where the gathered keys lie that an op works on -> their number, for `kept_as_shards`."""
        self._gradient: _InFlight | None = None

    def send(self, *local: Tensor) -> tuple[Tensor, ...]:
        """Announce this rank's keys, numbered in this order; returns them, and they must go to `receive`."""
        self._local = [x.detach().contiguous() for x in local]
        return _Send.apply(self, *local)

    def start(self, *numbers: int) -> None:
        """Start to gather these tensors (none named: all) unless they are on their way or have arrived."""
        coming = {number for together, _ in self._gathers for number in together}
        missing = [n for n in numbers or range(len(self._local)) if n not in coming and n not in self._all]
        if missing:
            rows = torch.cat([self._local[number].flatten(1) for number in missing], dim=1)
            result = rows.new_empty(self._layout.place.numel(), rows.shape[1])
            work = torch.distributed.all_gather_into_tensor(result, rows, group=self._group, async_op=True)
            self._gathers.append((missing, _InFlight(result, work)))

    def peek(self, number: int) -> Tensor:
        """What `receive` will return for this tensor, without a gradient; kept until then."""
        if number not in self._all:
            self.start(number)
            (gather,) = (gather for gather in self._gathers if number in gather[0])
            self._gathers.remove(gather)
            numbers, in_flight = gather
            in_rank_order = in_flight.wait()
            widths = [self._local[each][0].numel() for each in numbers]
            for each, columns in zip(numbers, in_rank_order.split(widths, dim=1), strict=True):
                in_order = columns.index_select(0, self._layout.place)
                self._all[each] = in_order.view(-1, *self._local[each].shape[1:])
        return self._all[number]

    def receive(self, *local: Tensor) -> tuple[Tensor, ...]:
        """The keys of all ranks, [T, ...] in global order, with the gradients of the tensors of `send`."""
        return _Receive.apply(self, *local)

    # -- used by the autograd functions and hooks below ------------------------------------------------------

    def _take(self) -> tuple[Tensor, ...]:
        self.start()
        result = tuple(self.peek(number) for number in range(len(self._local)))
        self._all = {}
        self._storage = {x.untyped_storage().data_ptr(): number for number, x in enumerate(result)}
        return result

    def _start_return(self, gradients: tuple[Tensor, ...]) -> None:
        self._all = {}  # the op's backward pass is over
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        rows = [x.flatten(1) for x in gradients]
        in_rank_order = rows[0].new_empty(rows[0].shape[0], sum(x.shape[1] for x in rows), dtype=dtype)
        source = self._layout.owned.flatten()
        for columns, x in zip(in_rank_order.split([x.shape[1] for x in rows], dim=1), rows, strict=True):
            columns.copy_(x.index_select(0, source))
        result = in_rank_order.new_empty(self._layout.local.numel(), in_rank_order.shape[1])
        work = torch.distributed.reduce_scatter_tensor(
            result, in_rank_order, group=self._group, async_op=True
        )
        self._gradient = _InFlight(result, work)

    def _finish_return(self) -> tuple[Tensor, ...] | None:
        if self._gradient is None:
            return None
        gradient, self._gradient = self._gradient.wait(), None
        parts = gradient.split([x[0].numel() for x in self._local], dim=1)
        return tuple(part.reshape(x.shape) for part, x in zip(parts, self._local, strict=True))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: KeyExchange, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(x.view_as(x) for x in local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        returned = ctx.exchange._finish_return()
        if returned is not None:
            gradients = tuple(x + y.to(x.dtype) for x, y in zip(gradients, returned, strict=True))
        return None, *gradients


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: KeyExchange, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        ctx.shapes = [x.shape for x in local]
        return exchange._take()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange._start_return(gradients)
        # The sums are still under way. They go to `_Send` past autograd, which might read what it carries:
        # for autograd there are zeros, of no memory, to which `_Send` adds.
        return None, *(gradients[0].new_zeros(()).expand(shape) for shape in ctx.shapes)


@dataclass(frozen=True)
class _Note:
    """In place of a saved tensor: gather the keys again, and look at them like that."""

    exchange: KeyExchange
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        self.exchange.start()
        return self.exchange.peek(self.number).as_strided(self.size, self.stride, self.offset)


@contextmanager
def kept_as_shards(exchange: KeyExchange | None) -> Iterator[None]:
    """Within it, autograd saves no keys that this exchange received: it gathers them again when needed.

    What an op derives from them (a copy in another dtype) is saved as ever. None changes nothing.
    """
    if exchange is None:
        yield
        return

    def save(tensor: Tensor) -> Tensor | _Note:
        number = exchange._storage.get(tensor.untyped_storage().data_ptr())
        if number is None:
            return tensor
        return _Note(exchange, number, tensor.size(), tensor.stride(), tensor.storage_offset())

    def read(saved: Tensor | _Note) -> Tensor:
        return saved.read() if isinstance(saved, _Note) else saved

    try:
        with torch.autograd.graph.saved_tensors_hooks(save, read):
            yield
    finally:
        exchange._storage = {}  # the memory may soon be another tensor's


class _PrefetchInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, exchange: KeyExchange) -> Tensor:
        ctx.exchange = exchange
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start()
        return grads[0], None


def prefetched_in_backward(output: Tensor, exchange: KeyExchange) -> Tensor:
    """``output`` unchanged; when its gradient is known, the exchange starts to gather its keys again."""
    return _PrefetchInBackward.apply(output, exchange)
