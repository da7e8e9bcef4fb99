"""Lets Megatron's unmodified training loop run on a machine without a GPU, with gloo.

    from megatron_msa.training import no_gpu
    no_gpu.install_if_no_gpu()          # before the first `import megatron.training`
    import megatron.training

Megatron (0.19.2) assumes CUDA throughout: it creates tensors on device "cuda", asks for streams and events,
and keeps the CUDA generator's state. Here the machine gets one pretended device, "cuda:0", and everything
placed on it is an ordinary CPU tensor. Three rules keep the pretence from spreading:

* only Megatron's start-up hears that CUDA is there; `torch.cuda.is_available()` stays False for all others,
  so that Triton, torch.optim, DataLoader and our own kernels see the machine as it is;
* a call that mentions no CUDA device, no CUDA stream and no ReduceOp.AVG, and gathers tensors of one size,
  does what torch does;
* with a GPU nothing at all is changed.

Nothing else in the project asks which machine it runs on. One difference remains: CPU and "GPU" share a
random generator, and starting a data loader draws from it, so a resumed run is bit-exact only with dropout 0.
"""

import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch.utils._device import _device_constructors

from megatron_msa.training import megatron_fixes

CPU = torch.device("cpu")

# The Megatron modules that must hear that there is a GPU.
MEGATRON_ASKERS = (
    "megatron.training.initialize",  # asserts it; builds the parallel groups and seeds only if there is one
    "megatron.core.dist_checkpointing.strategies.async_utils",  # worker's device: rank modulo device count
)

_installed = False


def install_if_no_gpu() -> bool:
    """Install the stand-ins if this machine has no GPU. Call it before the first `import megatron.training`.

    Returns:
        True if the stand-ins are in place, False on a machine with a GPU (nothing was changed).
    """
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available():
        return False
    _installed = True
    # A GPU scheduling matter, but Megatron refuses tensor and context parallelism without it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _replace_device_queries()
    _replace_streams()
    _replace_random_state()
    _map_tensor_placement()
    _average_over_gloo()
    _gather_unequal_over_gloo()
    _import_megatron_uncompiled()
    _patch_megatron_core()
    return True


def argument_defaults() -> dict[str, Any]:
    """Megatron argument values (argparse dest -> value) that a machine without a GPU needs."""
    return {
        **megatron_fixes.argument_defaults(has_gpu=False),
        "distributed_backend": "gloo",
        "num_workers": 0,  # tests and demos are small; a forked loader costs more than it gives
        # These fusions are torch.compile code, which is not compiled here.
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
    }


def _replace_device_queries() -> None:
    """What Megatron asks about its device and the device's memory."""

    def for_megatron(answer: Any, truth: Callable[[], Any]) -> Callable[[], Any]:
        def query() -> Any:
            return answer if sys._getframe(1).f_globals.get("__name__") in MEGATRON_ASKERS else truth()

        return functools.wraps(truth)(query)

    cuda: Any = torch.cuda
    cuda.is_available = for_megatron(True, cuda.is_available)
    cuda.device_count = for_megatron(1, cuda.device_count)
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_name = lambda device=None: "cpu"
    properties = SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)
    cuda.get_device_properties = lambda device=None: properties
    # Empty in torch when CUDA never started; Megatron reads keys from it (--log-memory-to-tensorboard).
    cuda.memory_stats = lambda device=None: Counter()
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.device_memory_used = lambda device=None: 0


class _Event:
    """Stands for torch.cuda.Event: work is done when a call returns, so only the time needs remembering."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end_event: "_Event") -> float:
        """Milliseconds, as in CUDA."""
        return (end_event._time - self._time) * 1e3

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """Stands for torch.cuda.Stream: everything runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_streams() -> None:
    the_stream = _Stream()

    @contextmanager
    def stream_context(stream: Any) -> Iterator[None]:
        yield

    cuda: Any = torch.cuda
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = stream_context
    cuda.current_stream = lambda device=None: the_stream
    cuda.default_stream = cuda.current_stream
    cuda.set_stream = lambda stream: None
    cuda.is_current_stream_capturing = lambda: False
    # NVTX ranges mark work on a GPU's timeline; CPU builds of torch refuse them.
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0


def _replace_random_state() -> None:
    """One generator, the CPU's, stands for the CUDA generator (Megatron saves, restores and forks both)."""
    modules: list[Any] = [torch.cuda, torch.cuda.random]
    for module in modules:
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def _is_cuda(device: Any) -> bool:
    """Whether a `device` argument means the pretended GPU. A bare index does: torch counts accelerators."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` (takes device=, maybe pin_memory=) with the CPU in place of a CUDA device."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = CPU
            if "pin_memory" in kwargs:  # pinning asks the driver
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _map_tensor_placement() -> None:
    """Tensors that Megatron puts on "cuda" are CPU tensors.

    Wrapped functions rather than a TorchFunctionMode: a mode costs microseconds on every operator of a step.
    """
    like = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
    # torch's own list of the functions with a device argument, which leaves out the `_like` ones.
    names = {function.__name__ for function in _device_constructors()} | set(like)
    for name in sorted(names):
        if hasattr(torch, name):
            setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor_class: Any = torch.Tensor
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(tensor_class, name, _on_cpu(getattr(tensor_class, name)))

    original_to = tensor_class.to
    original_type = tensor_class.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        # Megatron's optimizers sort parameters, and clipping checks gradients, by the name of the CUDA type.
        if isinstance(result, str):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer."):
                return result.replace("torch.", "torch.cuda.", 1)
        return result

    tensor_class.to = to
    tensor_class.type = type_
    tensor_class.cuda = lambda self, device=None, non_blocking=False, memory_format=None: self
    tensor_class.pin_memory = lambda self, device=None: self
    tensor_class.record_stream = lambda self, stream: None


def _average_over_gloo() -> None:
    """gloo has no ReduceOp.AVG: divide, then sum, which also holds for asynchronous and coalesced calls."""
    distributed: Any = torch.distributed
    average = distributed.ReduceOp.AVG
    sum_ = distributed.ReduceOp.SUM
    original_all_reduce = distributed.all_reduce
    original_reduce_scatter = distributed.reduce_scatter_tensor

    def size(group: Any) -> int:
        return max(distributed.get_world_size(group), 1)  # -1 on a rank outside the group

    @functools.wraps(original_all_reduce)
    def all_reduce(tensor: torch.Tensor, op: Any = sum_, group: Any = None, async_op: bool = False) -> Any:
        if op == average:
            tensor.detach().div_(size(group))
            op = sum_
        return original_all_reduce(tensor, op, group, async_op)

    @functools.wraps(original_reduce_scatter)
    def reduce_scatter_tensor(
        output: torch.Tensor, input: torch.Tensor, op: Any = sum_, group: Any = None, async_op: bool = False
    ) -> Any:
        if op == average:
            input = input / size(group)
            op = sum_
        return original_reduce_scatter(output, input, op, group, async_op)

    distributed.all_reduce = all_reduce
    distributed.reduce_scatter_tensor = reduce_scatter_tensor


def _gather_unequal_over_gloo() -> None:
    """gloo gathers tensors of one size only; experts sharded over tensor parallelism gather unequal ones."""
    distributed: Any = torch.distributed
    original = distributed.all_gather

    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        rows = [each.shape[0] if each.dim() else 1 for each in tensor_list]
        if min(rows) == max(rows) or async_op:
            return original(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        original(gathered, padded, group)
        for target, source in zip(tensor_list, gathered, strict=True):
            target.copy_(source[: target.shape[0]])
        return None

    distributed.all_gather = all_gather


def _import_megatron_uncompiled() -> None:
    """Megatron decorates small functions with torch.compile: on a CPU, a C++ compiler and a long first step.

    Decorating alone imports the compiler; without that, Megatron's import takes half the time.
    """
    if "megatron.core.jit" in sys.modules:  # too late: the functions are decorated
        from torch._dynamo import config as dynamo_config

        dynamo_config.disable = True
        return

    def leave_alone(function: Any = None, **kwargs: Any) -> Any:
        return function if function is not None else leave_alone

    original_compile = torch.compile
    torch.compile = leave_alone  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401  (keeps what torch.compile is now)
    finally:
        torch.compile = original_compile


def _patch_megatron_core() -> None:
    """Three functions of Megatron itself."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # Sets the state through torch.cuda.default_generators, which is empty here.
    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._set_cuda_rng_state = set_rng_state

    # Split sizes of the all-to-all become numpy only on their way from a GPU; tensors are refused there.
    original_move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return original_move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_tensor_to_cpu

    # The first save starts a process for a queue. It is spawned to keep clear of CUDA, and so imports the
    # whole program again, which takes longer than the save; a fork does not.
    filesystem_async.get_write_results_queue = functools.partial(
        filesystem_async.get_write_results_queue, mp_mode="fork"
    )
