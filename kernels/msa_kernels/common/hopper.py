"""Where the Triton kernels run: Hopper GPUs, and CPUs through Triton's interpreter."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def device_refusal(tensor: Tensor) -> str | None:
    """Why kernels cannot run on the device of a call's inputs; None if they can."""
    if not tensor.is_cuda:
        interpreted = triton.knobs.runtime.interpret
        return None if interpreted else f"the inputs are on {tensor.device.type}, not on a CUDA device"
    if torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return "it needs a GPU of compute capability 9.0 (Hopper) or higher"
    return None
