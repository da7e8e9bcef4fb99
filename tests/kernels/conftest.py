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
    """Fills what torch.empty returns, so that an element that a kernel leaves unwritten shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 123_456_789)

    monkeypatch.setattr(torch, "empty", poisoned)
