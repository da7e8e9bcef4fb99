"""Peak speed of known GPUs from the vendor's data sheets: bf16 tensor-core TFLOP/s, without 2:4 sparsity."""

from __future__ import annotations

import re

# Names as torch.cuda.get_device_name() gives them, without the leading "NVIDIA ". A pattern must match the
# whole name: the H100 is sold as SXM, PCIe and NVL with different peaks, and a MIG slice has the GPU's
# name with a suffix.
_PEAK_BF16_TFLOPS = {
    r"H100 80GB HBM3": 989.0,  # SXM5
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H200": 989.0,  # SXM
    r"H200 NVL": 835.0,
    r"H800": 989.0,  # SXM
    r"H20": 148.0,
    r"GH200 (120GB|480GB|144G HBM3e)": 989.0,
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"A100-(SXM4|PCIE)-(40GB|80GB)": 312.0,
    r"A100 80GB PCIe": 312.0,
    r"A800-SXM4-80GB": 312.0,
    r"A800 80GB PCIe": 312.0,
    r"L40S": 362.0,
    r"L4": 121.0,
}


def peak_bf16_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOP/s, or None if the GPU is not known: then there is no MFU.

    Args:
        device_name: as `torch.cuda.get_device_name()` returns it.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((peak for pattern, peak in _PEAK_BF16_TFLOPS.items() if re.fullmatch(pattern, name)), None)
