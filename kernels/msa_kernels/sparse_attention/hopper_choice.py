"""Which calls take the kernels written for Hopper: hopper_shared.py, hopper_rest.py, hopper_backward.py."""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

# Releases of Triton whose Gluon the kernels have been run with, and their groups: those whose rows fill whole
# 8-row atoms of the shared-memory layout that the tensor cores read.
GLUON_VERSIONS = ("3.6.",)
GROUP_SIZES = (8, 16)
# The backward kernel cuts both into two halves of 64.
BACKWARD_DIM = BACKWARD_BLOCK_SIZE = 128

logger = logging.getLogger(__name__)


def takes_hopper_kernels(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether the forward kernels can take these inputs; they and the others are copied by the kernels."""
    # Gluon has no interpreter.
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    if q.shape[1] // k.shape[1] not in GROUP_SIZES:
        return False
    # 16 bytes are copied at a time.
    if any(tensor.data_ptr() % 16 for tensor in (q, k, v, *others)):
        return False
    if not triton.__version__.startswith(GLUON_VERSIONS):
        _say_that_gluon_is_another(triton.__version__)
        return False
    return True


def takes_hopper_backward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, block_size: int) -> bool:
    """Likewise, of the backward kernel."""
    if q.shape[2] != BACKWARD_DIM or block_size != BACKWARD_BLOCK_SIZE:
        return False
    return takes_hopper_kernels(q, k, v, dout)


@functools.cache
def _say_that_gluon_is_another(version: str) -> None:
    """Once: Gluon changes from one release of Triton to the next."""
    logger.warning(
        "sparse_attention takes its portable kernels: the faster ones for Hopper have been run with "
        "Triton %s only, this is %s",
        ", ".join(f"{each}x" for each in GLUON_VERSIONS),
        version,
    )
