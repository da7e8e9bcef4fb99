"""Rows of a cache in pages, as they are or in 8 bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max


class PagedRows:
    """One row of ``dim`` numbers per token and head, in pages of ``block_size`` tokens, allocated once.

    Attributes:
        data: [pages, heads, block_size, dim]; one page of one head is contiguous.
        scale: fp32 [pages, heads, block_size] for rows in 8 bit (a row is ``data * scale``), else None.
    """

    def __init__(
        self, pages: int, heads: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros: kernels may load the unused rows of a page before they mask them, and NaN survives a mask.
        self.data = torch.zeros(pages, heads, block_size, dim, dtype=dtype, device=device)
        self.scale: Tensor | None = None
        if dtype == E4M3:
            self.scale = torch.zeros(pages, heads, block_size, dtype=torch.float32, device=device)

    @staticmethod
    def bytes_per_token(heads: int, dim: int, dtype: torch.dtype) -> int:
        """Memory of one token's rows."""
        scale = torch.float32.itemsize if dtype == E4M3 else 0
        return heads * (dim * dtype.itemsize + scale)

    def write(self, page: Tensor, offset: Tensor, rows: Tensor) -> None:
        """Store the rows [t, heads, dim] at these places, int64 [t] each."""
        if self.scale is None:
            self.data[page, :, offset] = rows.to(self.data.dtype)
            return
        values, scale = to_e4m3(rows)
        # As bytes: indexing is not implemented for 8-bit floats on every device.
        self.data.view(torch.uint8)[page, :, offset] = values.view(torch.uint8)
        self.scale[page, :, offset] = scale

    def read(self, pages: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """The first ``tokens`` rows of these pages (int64 [n], in order): [tokens, heads, dim]."""
        if self.scale is None:
            rows = self.data[pages].to(dtype)
        else:
            values = self.data.view(torch.uint8)[pages].view(E4M3)
            rows = _exact(values, self.scale[pages], dtype)
        return rows.transpose(1, 2).flatten(0, 1)[:tokens]


def to_e4m3(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8 bit with one scale each, so that the largest entry of a row becomes the largest e4m3 number.

    The error of an entry is at most 2^-4 of itself, or 2^-10 scales where it is subnormal.

    Args:
        rows: [..., dim].

    Returns:
        float8_e4m3fn [..., dim] and fp32 [...], with rows = values * scale up to rounding.
    """
    rows = rows.float()
    scale = rows.abs().amax(dim=-1) / _LARGEST
    # A row of zeros, and rows so small that their scale would be subnormal, keep a scale that divides.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    values = (rows / scale[..., None]).clamp(-_LARGEST, _LARGEST).to(E4M3)
    return values, scale


def as_kept(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of this dtype gives back for these rows, in their own dtype.

    Args:
        rows: [..., dim].
        dtype: of the cache.
    """
    if dtype != E4M3:
        return rows.to(dtype).to(rows.dtype)
    values, scale = to_e4m3(rows)
    return _exact(values, scale, rows.dtype)


def _exact(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale, computed in fp32 or better."""
    exact = torch.promote_types(dtype, torch.float32)
    return (values.to(exact) * scale[..., None]).to(dtype)


def pages_for(tokens: int, block_size: int) -> int:
    """Pages that this many tokens take."""
    return math.ceil(tokens / block_size)
