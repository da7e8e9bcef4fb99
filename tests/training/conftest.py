"""Megatron in one process, on a machine with or without a GPU."""

from collections.abc import Iterator

import pytest
import torch

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()  # before the test modules import Megatron


@pytest.fixture(scope="module")
def process_groups() -> Iterator[None]:
    """Process groups of one rank, for a module's tests; the store in memory needs no port."""
    from megatron.core import parallel_state

    from megatron_msa.training import megatron_fixes

    megatron_fixes.apply()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
