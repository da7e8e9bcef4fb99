"""The cache of one engine: keys, values and index keys of every layer, in pages of one MSA block.

Page 0 belongs to no sequence: what must be written somewhere (padding, idle rows of a decode batch) goes to
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_msa.errors import ConfigError
from megatron_msa.inference.paged_rows import E4M3, PagedRows, pages_for

SCRATCH_PAGE = 0


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """What is kept per token on one rank.

    Attributes:
        block_size: tokens of a page (B).
        groups: key and value heads of this rank.
        head_dim: of keys and values (d).
        index_head_dim: of index keys (d_i).
        selects_blocks: per layer, whether it has index keys.
        dtype: of keys and values; float8_e4m3fn keeps a scale per token and head.
        index_dtype: of index keys.
    """

    block_size: int
    groups: int
    head_dim: int
    index_head_dim: int
    selects_blocks: Sequence[bool]
    dtype: torch.dtype
    index_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: GPTModel,
        selects_blocks: Sequence[bool],
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None,
        index_key_dtype: torch.dtype | None,
    ) -> CacheFormat:
        """The format for a model that computes in ``dtype``; None keeps rows in that.

        Raises:
            ConfigError: rows in a dtype that there are no operators for.
        """
        for name, value in (("cache_dtype", cache_dtype), ("index_key_dtype", index_key_dtype)):
            if value not in (None, dtype, E4M3):
                raise ConfigError(
                    f"{name} is {value}; allowed: None for the model's dtype ({dtype}), or {E4M3}"
                )
        config = model.config
        return cls(
            block_size=config.msa_block_size,
            groups=config.num_query_groups // get_pg_size(model.pg_collection.tp),
            head_dim=config.kv_channels,
            index_head_dim=config.msa_indexer_head_dim,
            selects_blocks=selects_blocks,
            dtype=cache_dtype or dtype,
            index_dtype=index_key_dtype or dtype,
        )

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, on this rank."""
        main = 2 * PagedRows.bytes_per_token(self.groups, self.head_dim, self.dtype)
        index = PagedRows.bytes_per_token(1, self.index_head_dim, self.index_dtype)
        return len(self.selects_blocks) * main + sum(self.selects_blocks) * index

    def bytes_for(self, pages: int) -> int:
        """Of a cache of this many pages and the scratch page."""
        return (pages + 1) * self.block_size * self.bytes_per_token


class LayerCache:
    """Keys, values and, where the layer selects blocks, index keys of one layer."""

    def __init__(self, form: CacheFormat, pages: int, device: torch.device, *, has_index: bool) -> None:
        shape = (pages, form.groups, form.block_size, form.head_dim)
        self.key = PagedRows(*shape, form.dtype, device)
        self.value = PagedRows(*shape, form.dtype, device)
        self.index_key: PagedRows | None = None
        if has_index:
            self.index_key = PagedRows(
                pages, 1, form.block_size, form.index_head_dim, form.index_dtype, device
            )

    def write(
        self, page: Tensor, offset: Tensor, key: Tensor, value: Tensor, index_key: Tensor | None
    ) -> None:
        """Keep the rows of new tokens, [t, heads, d] each, at these places (int64 [t])."""
        self.key.write(page, offset, key)
        self.value.write(page, offset, value)
        if self.index_key is not None:
            assert index_key is not None
            self.index_key.write(page, offset, index_key)


class PagedCache:
    """The caches of all layers, allocated once."""

    def __init__(self, form: CacheFormat, pages: int, device: torch.device) -> None:
        self.form = form
        self.device = device
        self.layers = [
            LayerCache(form, pages + 1, device, has_index=has_index) for has_index in form.selects_blocks
        ]


class Slots:
    """Which pages belong to which of a fixed number of sequences; kept on the host.

    A sequence gets all its pages when it starts, so that none can run out of them halfway.
    """

    def __init__(self, slots: int, pages: int, block_size: int) -> None:
        self.block_size = block_size
        self._free_slots = list(range(slots))
        self._free_pages = list(range(SCRATCH_PAGE + 1, pages + 1))
        self._pages: dict[int, list[int]] = {}

    def admit(self, tokens: int) -> int | None:
        """A slot with pages for this many tokens, or None while there is no room."""
        needed = pages_for(tokens, self.block_size)
        if not self._free_slots or needed > len(self._free_pages):
            return None
        slot = min(self._free_slots)
        self._free_slots.remove(slot)
        self._pages[slot], self._free_pages = self._free_pages[:needed], self._free_pages[needed:]
        return slot

    def release(self, slot: int) -> None:
        """Give a slot and its pages back."""
        self._free_pages += self._pages.pop(slot)
        self._free_slots.append(slot)

    def pages(self, slot: int) -> list[int]:
        """The pages of a slot, in the order of its tokens."""
        return self._pages[slot]
