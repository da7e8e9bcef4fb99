"""Claims about `KeyExchange`, checked on every rank of a group; see `test_context_parallel.py`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_msa.attention.context_parallel import TokenLayout, batch_layout
from megatron_msa.attention.key_exchange import KeyExchange, kept_as_shards, prefetched_in_backward

TOKENS, HEADS, DIM = 32, 2, 3


class Calls:
    """Names of the collectives that were started and waited for, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> "Calls":
        self._originals = (dist.all_gather_into_tensor, dist.reduce_scatter_tensor)
        dist.all_gather_into_tensor = self._recorded("gather", dist.all_gather_into_tensor)
        dist.reduce_scatter_tensor = self._recorded("scatter", dist.reduce_scatter_tensor)
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = self._originals

    def _recorded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert kwargs["async_op"]
            self.names.append(f"start {name}")
            work = original(*args, **kwargs)
            calls = self

            class Work:
                def wait(self) -> None:
                    calls.names.append(f"wait {name}")
                    work.wait()

            return Work()

        return call


class Note(torch.autograd.Function):
    """Stands for other work: writes its name into a list, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, names: list[str]) -> Tensor:
        ctx.names = names
        names.append("work")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.names.append("work")
        return grads[0], None


def exchange_claims(group: dist.ProcessGroup) -> dict[str, bool]:
    """Collective over the group; a claim holds if it holds on every rank."""
    size, rank = group.size(), group.rank()
    layout = batch_layout(
        "zigzag", batch=2, length=TOKENS // 2, size=size, rank=rank, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(3)  # the same on every rank
    keys = torch.randn(TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)
    factors = torch.randn(size, TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)
    checks = (_values, _sixteen_bit, _elsewhere, _order, _graph, _recomputed)
    found: dict[str, bool] = {}
    for check in checks:
        found |= check(layout, group, keys, factors)
    holds = torch.tensor([float(value) for value in found.values()])
    dist.all_reduce(holds, op=dist.ReduceOp.MIN, group=group)
    return {name: bool(value) for name, value in zip(found, holds, strict=True)}


def _local(layout: TokenLayout, keys: Tensor) -> Tensor:
    return keys[layout.local].clone().requires_grad_()


def _values(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    local = _local(layout, keys)
    exchange = KeyExchange(layout, group)
    narrow = _local(layout, keys[:, 0, :2])  # another shape travels along
    everything, narrow_keys = exchange.receive(*exchange.send(local, narrow))
    arrived = torch.equal(everything, keys) and torch.equal(narrow_keys, keys[:, 0, :2])
    _loss(everything, narrow_keys, factors[layout.rank]).backward()
    # Oracle: one process whose loss is the sum of the ranks' losses.
    whole, whole_narrow = (x.clone().requires_grad_() for x in (keys, keys[:, 0, :2]))
    sum(_loss(whole, whole_narrow, factor) for factor in factors).backward()
    pairs = ((local, whole), (narrow, whole_narrow))
    return {
        "keys of all ranks arrive in global order": arrived,
        "gradients are the sums over all ranks": all(
            torch.allclose(part.grad, x.grad[layout.local], rtol=1e-14, atol=1e-14) for part, x in pairs
        ),
    }


def _loss(keys: Tensor, narrow: Tensor, factor: Tensor) -> Tensor:
    return (keys**2 * factor).sum() + (narrow**3 * factor[:, 1, :2]).sum()


def _sixteen_bit(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    local = _local(layout, keys.bfloat16())
    exchange = KeyExchange(layout, group)
    part = factors[layout.rank].bfloat16()
    exchange.receive(*exchange.send(local))[0].backward(part)
    expected = factors.bfloat16().float().sum(dim=0).bfloat16()[layout.local]
    sums: list[torch.dtype] = []
    original = dist.reduce_scatter_tensor

    def recorded(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums.append(output.dtype)
        return original(output, *args, **kwargs)

    dist.reduce_scatter_tensor = recorded
    try:
        again = KeyExchange(layout, group)
        again.receive(*again.send(_local(layout, keys.bfloat16())))[0].backward(part)
    finally:
        dist.reduce_scatter_tensor = original
    assert local.grad is not None
    same = torch.equal(local.grad, expected)
    return {"16-bit gradients are summed in fp32": same and sums == [torch.float32]}


def _elsewhere(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    grads = []
    for weight in (0.0, 1.0):
        local = _local(layout, keys)
        exchange = KeyExchange(layout, group)
        (sent,) = exchange.send(local)
        ((exchange.receive(sent)[0] * factors[layout.rank]).sum() + weight * (sent**3).sum()).backward()
        grads.append(local.grad)
    expected = grads[0] + 3 * keys[layout.local] ** 2
    close = torch.allclose(grads[1], expected, rtol=1e-13, atol=1e-13)
    return {"a gradient that reaches the local keys elsewhere is added": close}


def _order(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    with Calls() as calls:
        query = keys.clone().requires_grad_()
        exchange = KeyExchange(layout, group)
        first, second = exchange.send(_local(layout, keys), _local(layout, keys))
        exchange.start(0)
        scored = Note.apply(query, calls.names)
        exchange.start()
        selected = exchange.peek(0)
        everything, others = exchange.receive(first, second)
        assert torch.equal(selected, keys)
        forward = list(calls.names)
        del calls.names[:]
        (scored * everything * others).sum().backward()
    in_order = ["start gather", "work", "start gather", "wait gather", "wait gather"]
    return {
        "keys are on their way while other work is done": forward == in_order,
        "gradients are on their way while other work is done": calls.names
        == ["start scatter", "work", "wait scatter"],
    }


def _graph(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    local = _local(layout, keys)
    kept = {}
    with Calls() as calls:
        for drops in (False, True):
            exchange = KeyExchange(layout, group)
            (everything,) = exchange.receive(*exchange.send(local))
            memory = StorageWeakRef(everything.untyped_storage())
            with kept_as_shards(exchange if drops else None):
                product = _read_three_times(everything)
            del everything
            kept[drops] = not memory.expired()
        output = prefetched_in_backward(Note.apply(product, calls.names), exchange)
        del calls.names[:]
        output.sum().backward()
    whole = keys.clone().requires_grad_()
    _read_three_times(whole).sum().backward()
    assert local.grad is not None
    assert whole.grad is not None
    right = torch.allclose(local.grad, whole.grad[layout.local] * layout.size, rtol=1e-12, atol=1e-12)
    return {
        "the graph keeps no gathered keys": kept == {False: True, True: False} and right,
        "the backward pass gathers each tensor once": calls.names.count("start gather") == 1,
        "keys are on their way back ahead of the need": calls.names[:3]
        == ["start gather", "work", "wait gather"],
    }


def _read_three_times(keys: Tensor) -> Tensor:
    """A function whose backward pass needs the keys as they are, and two views of them."""
    return (keys * keys[..., :1]).transpose(0, 1).matmul(keys.permute(1, 2, 0))


def _recomputed(layout: TokenLayout, group: Any, keys: Tensor, factors: Tensor) -> dict[str, bool]:
    local = _local(layout, keys)
    exchange = KeyExchange(layout, group)
    factor = factors[layout.rank]
    with Calls() as calls:
        (sent,) = exchange.send(local)
        output = tensor_parallel.checkpoint(lambda x: exchange.receive(x)[0] ** 2 * factor, False, sent)
        forward = calls.names.count("start gather")
        output.sum().backward()
    whole = keys.clone().requires_grad_()
    sum((whole**2 * each).sum() for each in factors).backward()
    assert whole.grad is not None
    right = torch.allclose(local.grad, whole.grad[layout.local], rtol=1e-13, atol=1e-13)
    counts = (forward, calls.names.count("start gather"), calls.names.count("start scatter"))
    return {"a recomputed forward pass gathers again": right and counts == (1, 2, 1)}
