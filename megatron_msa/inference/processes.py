"""The process groups of an inference job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_msa.errors import ConfigError


@contextlib.contextmanager
def process_groups(
    *, tensor_parallel: int = 1, context_parallel: int = 1, expert_parallel: int = 1
) -> Iterator[None]:
    """Megatron's groups for the processes of a torchrun world, or for this process alone.

    Groups that the caller has already stay as they are.

    Ranks beyond tensor x context parallelism are data-parallel: each may work on sequences of its own, unless
    expert parallelism joins them.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for flag, size in (
        ("--tensor-model-parallel-size x --context-parallel-size", tensor_parallel * context_parallel),
        ("--expert-model-parallel-size", expert_parallel),
    ):
        if size < 1 or world % size:
            raise ConfigError(
                f"{flag} is {size}, and there are {world} processes, which is no multiple of it; start "
                "torchrun with another --nproc-per-node"
            )
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if on_gpu else "gloo"
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(backend)
    else:  # a store in memory: no port, no launcher
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        context_parallel_size=context_parallel,
        expert_model_parallel_size=expert_parallel,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
