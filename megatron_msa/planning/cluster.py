"""The machines of a plan: GPUs by name, nodes, and the rates of their links."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_msa.errors import ConfigError
from megatron_msa.training.hardware import peak_bf16_tflops


@dataclass(frozen=True)
class Gpu:
    """What a plan has to know of a GPU.

    Attributes:
        device_name: as `torch.cuda.get_device_name()` returns it; its peak is looked up by that.
        memory_gib: memory that CUDA reports, GiB.
        memory_tb_per_s: rate of that memory, from the data sheet.
    """

    device_name: str
    memory_gib: float
    memory_tb_per_s: float

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 peak."""
        peak = peak_bf16_tflops(self.device_name)
        assert peak is not None
        return peak


GPUS = {
    "H100": Gpu("H100 80GB HBM3", 79.1, 3.35),
    "H200": Gpu("H200", 139.8, 4.8),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A number of equal nodes.

    Attributes:
        node_gb_per_s: that one GPU receives from GPUs of its node, in a collective.
        network_gb_per_s: the same from other nodes.
        reserved_gib: of a GPU's memory that tensors cannot have: CUDA and NCCL, fragmentation.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8
    node_gb_per_s: float
    network_gb_per_s: float
    reserved_gib: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def link_gb_per_s(self, span: int) -> float:
        """Rate within a group whose ranks lie among ``span`` consecutive ones."""
        return self.node_gb_per_s if span <= self.gpus_per_node else self.network_gb_per_s


def gpu(name: str) -> Gpu:
    """A GPU by its short name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name}; allowed: {', '.join(GPUS)}")
    return GPUS[name]
