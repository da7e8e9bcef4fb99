"""What the Gluon kernels for Hopper share: how rows lie in shared memory, get there and are handed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Elements of a row that lie side by side in shared memory: 128 bytes, the span of the swizzle that tensor
# cores read without conflicts. A tile of [rows, d] is d / PART such parts, one behind the other.
PART = 64


def boxes_of(tensor: Tensor, rows: int, row_size: int, box: list[int]) -> TensorDescriptor:
    """For TMA copies of ``box`` [box rows, box size] out of or into tensor, seen as [rows, row_size].

    Of boxes that reach beyond the tensor, that part is read as zeros and not written.
    """
    layout: Any = NVMMASharedLayout(swizzle_byte_width=2 * PART, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, [rows, row_size], [row_size, 1], box, layout)


@gluon.jit
def release(barrier):
    """Arrives at a barrier once all warps of the caller are here: one arrival for all of them."""
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)
