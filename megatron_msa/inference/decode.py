"""One new token of each running sequence: static buffers, so that a CUDA graph can hold the whole step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msa_kernels import decode_attention, decode_select
from torch import Tensor

from megatron_msa.inference.cache import PagedCache
from megatron_msa.inference.context import AttentionSettings, CacheContext


class DecodeBatch(CacheContext):
    """The forward pass over one token of each row of a batch; rows may be idle.

    Attributes:
        tokens: int64 [n], the next token of each row.
        lengths: int32 [n], tokens of each sequence that are in the cache; 0 for an idle row.
        positions: int64 [n], of ``tokens``.
        page_table: int32 [n, most pages of a sequence], 0 where there is none.
    """

    def __init__(
        self,
        cache: PagedCache,
        settings: AttentionSettings,
        max_sequence_length: int,
        *,
        rows: int,
        pages_per_row: int,
    ) -> None:
        super().__init__(cache, settings, max_sequence_length)
        device = cache.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(rows, pages_per_row, dtype=torch.int32, device=device)
        self._is_running = torch.zeros(rows, dtype=torch.int32, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._page = torch.zeros(rows, dtype=torch.int64, device=device)
        self._offset = torch.zeros(rows, dtype=torch.int64, device=device)

    def load(self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Put sequences into the first rows; the others become idle.

        Args:
            tokens: the next token of each sequence.
            lengths: tokens of each that are in the cache.
            pages: of each sequence.
        """
        rows, columns = self.page_table.shape
        table = torch.zeros(rows, columns, dtype=torch.int32)
        for row, numbers in enumerate(pages):
            table[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        idle = [0] * (rows - len(tokens))
        self.page_table.copy_(table)
        self.tokens.copy_(torch.tensor([*tokens, *idle]))
        self.lengths.copy_(torch.tensor([*lengths, *idle]))
        self._is_running.copy_(torch.tensor([1] * len(tokens) + idle))

    def advance(self) -> None:
        """Make room for the next token of each sequence: the start of a step, on the device alone."""
        self.lengths += self._is_running
        self.positions.copy_((self.lengths - 1).clamp(min=0))
        block_size = self.cache.form.block_size
        self._page.copy_(self.page_table.gather(1, (self.positions // block_size)[:, None])[:, 0])
        self._offset.copy_(self.positions % block_size)

    def is_decode_only(self) -> bool:
        """See Megatron's contexts."""
        return True

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        index_query: Tensor | None,
        index_key: Tensor | None,
    ) -> Tensor:
        """See `KeyCacheContext.attend`."""
        layer = self.cache.layers[layer_number - 1]
        layer.write(self._page, self._offset, key, value, index_key)
        block_ids = None
        if index_query is not None:
            assert layer.index_key is not None
            index_scale = layer.index_key.scale
            block_ids = decode_select(
                index_query.unsqueeze(1).contiguous(),
                layer.index_key.data.squeeze(1),
                self.page_table,
                self.lengths,
                top_k=self.settings.num_selected_blocks,
                index_key_scale=None if index_scale is None else index_scale.squeeze(1),
                backend=self.settings.backend,
            )
        output = decode_attention(
            query.unsqueeze(1).contiguous(),
            layer.key.data,
            layer.value.data,
            self.page_table,
            self.lengths,
            block_ids,
            scale=self.settings.softmax_scale,
            key_scale=layer.key.scale,
            value_scale=layer.value.scale,
            backend=self.settings.backend,
        )
        return output.squeeze(1)
