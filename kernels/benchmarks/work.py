"""Useful work and compulsory traffic of the operators.

A multiplication and an addition count 2. E = pairs of a query and a key it attends to, for one group; C =
causal pairs. Forward: 4 d Hq per pair (two products). Backward: 10 d Hq (five products). Index scores: 2 d_i
Hkv. The KL gradient costs 6 d_i Hkv: the student's scores and two products; the teacher's scores are those
that the attention's backward recomputes anyway. Nothing is counted for work on masked pairs or done twice.
Bytes are inputs read once and outputs written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Heads


def attention_forward(heads: Heads, pairs: int) -> int:
    """FLOPs of softmax attention over ``pairs`` pairs per group, KL not counted."""
    return 4 * heads.dim * heads.query * pairs


def attention_backward(heads: Heads, pairs: int) -> int:
    """FLOPs of dq, dk and dv."""
    return 10 * heads.dim * heads.query * pairs


def index_scores(heads: Heads, pairs: int) -> int:
    """FLOPs of the index branch's scores."""
    return 2 * heads.index_dim * heads.groups * pairs


def kl_gradient(heads: Heads, pairs: int) -> int:
    """FLOPs of the KL gradient of index_q and index_k."""
    return 6 * heads.index_dim * heads.groups * pairs


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' values."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)
    )
