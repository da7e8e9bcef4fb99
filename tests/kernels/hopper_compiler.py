"""Compiles for Hopper what the operators launch, down to machine code, on a machine without a GPU.

    python tests/kernels/hopper_compiler.py [CASE ...]     prints a line per kernel; see cases(); default: all

The operators run on CPU tensors as they would on a GPU, but instead of a launch Triton compiles the kernel
for the arguments that it was given. Nothing is computed. In a process of its own, because Triton's target and
PyTorch's answers about the GPU are replaced for good.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
MULTIPROCESSORS = 132
SHARED_MEMORY = 232_448  # bytes that a program may take on compute capability 9.0
REGISTERS = 65_536  # of a multiprocessor, 32 bits each


class Compiled:
    """Kernels compiled so far: module and name -> bytes of shared memory of each call."""

    def __init__(self) -> None:
        self.shared_memory: dict[str, list[int]] = {}

    def replace_launches(self) -> None:
        """From now on kernels are compiled for compute capability 9.0 and not launched."""
        from triton.backends.compiler import GPUTarget
        from triton.runtime import JITFunction, driver

        target = GPUTarget("cuda", 90, 32)
        stub: Any = SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0
        )
        driver.set_active(stub)
        original = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            found = original(kernel, *args, grid=grid, warmup=True, **options)
            metadata = found.metadata
            name = f"{kernel.module}.{kernel.__name__}"
            self.shared_memory.setdefault(name, []).append(metadata.shared)
            threads, registers = 32 * metadata.num_warps, metadata.maxnreg
            if metadata.shared > SHARED_MEMORY:
                raise RuntimeError(f"{name} takes {metadata.shared:,} bytes of shared memory")
            if registers is not None and threads * registers > REGISTERS:
                raise RuntimeError(f"{name} takes {threads:,} threads of {registers} registers")
            if kernel.module.rpartition(".")[2].startswith("hopper_"):
                check_products_overlap(name, found.asm["cubin"])
            return found

        JITFunction.run = compile_only


def check_products_overlap(name: str, cubin: bytes) -> None:
    """Refuses a kernel that waits for every instruction of its products.

    ptxas writes one, which runs at half the speed, if it cannot follow the registers of a product in flight.
    It says so in a log that Triton does not show.
    """
    import triton

    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    products, waits = code.count("HGMMA"), code.count("WARPGROUP.DEPBAR")
    if 2 * waits > products:
        raise RuntimeError(f"{name} has {waits} waits for {products} instructions of products")


def pretend_to_be_hopper() -> None:
    """Lets the operators' checks of the device pass for tensors of the CPU."""
    from msa_kernels.common import hopper

    hopper.device_refusal = lambda tensor: None
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)


def fill_buffers() -> None:
    """What kernels would write holds -1 instead: as a selection, no block."""

    def filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: make(*args, **options).fill_(-1)

    new: Any = torch
    new.empty, new.Tensor.new_empty = filling(torch.empty), filling(torch.Tensor.new_empty)


def all_kernels() -> set[str]:
    """Module and name of every kernel of msa_kernels."""
    import msa_kernels
    from triton.runtime import JITFunction

    names = set()
    for found in pkgutil.walk_packages(msa_kernels.__path__, "msa_kernels."):
        for name, value in vars(importlib.import_module(found.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                names.add(f"{value.module}.{name}")
    return names


def cases() -> dict[str, Callable[[], None]]:
    """Calls of every operator, by name: those that the sanitizer takes."""
    from benchmarks import sanitize

    return {
        "training": lambda: sanitize.training(128, 128, 32, "cpu"),
        "training-group-3": lambda: sanitize.training(64, 64, 6, "cpu", torch.float16),
        "training-group-8": lambda: sanitize.training(64, 64, 16, "cpu", torch.float16),
        "training-group-8-of-128": lambda: sanitize.training(128, 128, 16, "cpu", torch.float16),
        "decode": lambda: sanitize.decode(128, 128, 16, "cpu"),
    }


def main(names: list[str]) -> None:
    """See the top of the file."""
    sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]
    compiled = Compiled()
    compiled.replace_launches()
    pretend_to_be_hopper()
    fill_buffers()
    known = cases()
    for name in names or known:
        known[name]()
    for name, shared in sorted(compiled.shared_memory.items()):
        print("compiled", name, len(shared), max(shared))
    for name in sorted(all_kernels() - set(compiled.shared_memory)):
        print("left out", name)


if __name__ == "__main__":
    main(sys.argv[1:])
