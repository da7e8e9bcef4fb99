"""Input tensors of one measurement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Heads, Shape


class Inputs(NamedTuple):
    """q [Q, Hq, d], k and v [K, Hkv, d], index_q [Q, Hkv, d_i], index_k [K, d_i]: leaves with gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor

    @classmethod
    def random(
        cls, shape: Shape, heads: Heads, device: torch.device, *, seed: int = 0, requires_grad: bool = True
    ) -> Inputs:
        """Standard normal values, in the dtype of ``heads``."""
        generator = torch.Generator(device).manual_seed(seed)
        queries, keys = shape.num_queries, shape.num_keys
        sizes = (
            (queries, heads.query, heads.dim),
            (keys, heads.groups, heads.dim),
            (keys, heads.groups, heads.dim),
            (queries, heads.groups, heads.index_dim),
            (keys, heads.index_dim),
        )
        return cls(
            *(
                torch.randn(size, generator=generator, device=device, dtype=heads.dtype).requires_grad_(
                    requires_grad
                )
                for size in sizes
            )
        )

    def of_queries(self, rows: Tensor, dtype: torch.dtype) -> Inputs:
        """The chosen queries and all keys, cast; new leaves."""
        parts = (self.q[rows], self.k, self.v, self.index_q[rows], self.index_k)
        return Inputs(*(part.detach().to(dtype).requires_grad_(part.requires_grad) for part in parts))


class Upstream(NamedTuple):
    """Gradients of the outputs: dout [Q, Hq, d] and dkl, fp32 [Q, Hkv]."""

    dout: Tensor
    dkl: Tensor

    @classmethod
    def random(cls, inputs: Inputs, *, seed: int = 1) -> Upstream:
        """Normal dout; dkl of the mean over queries and groups, as the loss takes it."""
        generator = torch.Generator(inputs.q.device).manual_seed(seed)
        dout = torch.randn(inputs.q.shape, generator=generator, device=inputs.q.device, dtype=inputs.q.dtype)
        rows = inputs.index_q.shape[:2]
        return cls(dout, torch.full(rows, 1 / (rows[0] * rows[1]), device=inputs.q.device))

    def only(self, rows: Tensor) -> Upstream:
        """Zero outside the chosen queries; dkl is 1 there, as large as dout."""
        dout, dkl = torch.zeros_like(self.dout), torch.zeros_like(self.dkl)
        dout[rows] = self.dout[rows]
        dkl[rows] = 1
        return Upstream(dout, dkl)
