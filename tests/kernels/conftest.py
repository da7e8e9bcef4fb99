"""Buffers that show what a kernel leaves unwritten; helpers and benchmarks made importable."""

import math
import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode leaves test folders out of sys.path; the benchmarks are no installed package.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "kernels")]


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Fills what torch.empty and its kin return, so that an element that a kernel leaves unwritten shows."""

    def poisoning(make):
        def make_poisoned(*args, **options):
            tensor = make(*args, **options)
            tensor.detach().fill_(math.nan if tensor.is_floating_point() else 99)
            return tensor

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
