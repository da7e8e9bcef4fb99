"""Index queries and keys rounded to 8 bits, for ranking only.

e4m3 has 3 bits of mantissa between 2^-6 and 448. Every vector gets a scale of its own, a power of two, so
that scaling is exact and no vector depends on others packed beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest e4m3 number."""


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds vectors to e4m3.

    Args:
        vectors: [..., d], bf16, fp16, fp32 or fp64.

    Returns:
        values, float8_e4m3fn [..., d], and scales, fp32 [...], with vectors = values * scales up to rounding.
        The scale of a vector that holds NaN or an infinity is NaN: all of its scores are NaN, and rank last.
    """
    largest = torch.linalg.vector_norm(vectors, torch.inf, dim=-1).float()
    # frexp gives x = m * 2^e with m < 1, so 2^e brings the largest entry below LARGEST.
    exponent = torch.frexp(largest / LARGEST).exponent
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    scales = scales.where(largest.isfinite(), torch.nan)
    # Dividing by a power of two is exact in bf16, whose exponents are those of fp32; fp16 has fewer.
    wide = vectors.float() if vectors.dtype == torch.float16 else vectors
    return (wide / scales[..., None].to(wide.dtype)).to(torch.float8_e4m3fn), scales
