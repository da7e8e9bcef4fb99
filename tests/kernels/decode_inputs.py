"""Paged caches for the tests of decoding: shuffled pages, and NaN wherever there is no token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Decoding(NamedTuple):
    """Inputs of decode_select and decode_attention, as there, and the sequences that are in the caches.

    ``keys``, ``values`` [groups, length, d] and ``index_keys`` [length, d_i] hold one tensor per sequence.
    """

    query: Tensor
    index_query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    index_key_cache: Tensor
    page_table: Tensor
    lengths: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    index_keys: list[Tensor]

    @property
    def select(self) -> tuple[Tensor, ...]:
        return self.index_query, self.index_key_cache, self.page_table, self.lengths

    @property
    def attend(self) -> tuple[Tensor, ...]:
        return self.query, self.key_cache, self.value_cache, self.page_table, self.lengths


def decoding(
    lengths: list[int],
    *,
    q_len: int = 1,
    heads: int = 4,
    groups: int = 2,
    dim: int = 6,
    index_dim: int = 5,
    block_size: int = 4,
    max_blocks: int | None = None,
    dtype: torch.dtype = torch.float64,
    ties: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Decoding:
    """Normal entries; with ``ties`` the index scores are small integers, exact in any order of summation.

    The page table has -1 and numbers of no page behind a sequence's last page.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def index(*shape: int) -> Tensor:
        if not ties:
            return normal(*shape) / 2
        values = torch.randint(-1, 2, shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) < 0.2)).double()

    used = [math.ceil(length / block_size) for length in lengths]
    columns = max_blocks or max(1, *used) + 1
    pages = sum(used) + 2
    order = torch.randperm(pages, generator=generator)
    table = torch.tensor([-1, 10**9])[torch.arange(columns) % 2].repeat(len(lengths), 1)
    keys = [normal(groups, length, dim).to(device, dtype) for length in lengths]
    values = [normal(groups, length, dim).to(device, dtype) for length in lengths]
    index_keys = [index(length, index_dim).to(device, dtype) for length in lengths]
    options = {"dtype": dtype, "device": device}
    key_cache, value_cache = (
        torch.full((pages, groups, block_size, dim), math.nan, **options) for _ in range(2)
    )
    index_key_cache = torch.full((pages, block_size, index_dim), math.nan, **options)
    taken = 0
    for sequence, length in enumerate(lengths):
        for block in range(used[sequence]):
            page = int(order[taken])
            taken += 1
            table[sequence, block] = page
            tokens = slice(block * block_size, min((block + 1) * block_size, length))
            count = tokens.stop - tokens.start
            key_cache[page, :, :count] = keys[sequence][:, tokens]
            value_cache[page, :, :count] = values[sequence][:, tokens]
            index_key_cache[page, :count] = index_keys[sequence][tokens]
    return Decoding(
        normal(len(lengths), q_len, heads, dim).to(device, dtype),
        index(len(lengths), q_len, groups, index_dim).to(device, dtype),
        key_cache,
        value_cache,
        index_key_cache,
        table.int().to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        keys,
        values,
        index_keys,
    )


def in_8_bits(cache: Tensor) -> tuple[Tensor, Tensor]:
    """The cache in e4m3, and scales that are no powers of two: fp32, one per row."""
    scale = cache.float().abs().amax(dim=-1).nan_to_num(nan=1.0) / 400 + 1e-6
    return (cache.float() / scale[..., None]).to(torch.float8_e4m3fn), scale
