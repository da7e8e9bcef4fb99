"""The peak speed of a GPU from its name."""

import pytest

from megatron_msa.training.hardware import peak_bf16_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_known_gpus_have_the_dense_bf16_peak_of_their_data_sheet(name, peak):
    assert peak_bf16_tflops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100",  # which of the three?
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of the GPU
        "NVIDIA H1000",
        "NVIDIA GeForce RTX 4090",
        "AMD Instinct MI300X",
        "cpu",
        "",
    ],
)
def test_an_unknown_gpu_has_no_peak_so_that_no_utilisation_is_reported(name):
    assert peak_bf16_tflops(name) is None
