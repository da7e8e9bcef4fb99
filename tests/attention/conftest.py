"""Megatron in one process: no launcher, process groups of a single rank."""

from collections.abc import Iterator

import pytest
import torch

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()  # before the test modules import Megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_msa.attention import kl_loss  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    """Per module, so that other folders' tests find no process group when they make their own."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # A store in memory needs no port.
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def global_state(process_groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with the same seed and without a loss scale of another test."""
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    monkeypatch.setattr(kl_loss._LossScale, "value", None)
