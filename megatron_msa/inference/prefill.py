"""Chunks of prompts: their keys go into the cache, their queries attend over the cached prefixes.

The operators are those of training (`block_select`, `sparse_attention`, `dense_kl`) with a layout whose
queries are the chunk and whose keys are the prefixes. Keys are always taken as the cache keeps them, so that
8-bit rows give the same result in any chunking.

Under context parallelism each rank takes every C-th token of a chunk, and every rank keeps all keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from msa_kernels import DocumentLayout, block_select, dense_kl, sparse_attention
from torch import Tensor

from megatron_msa.inference.cache import SCRATCH_PAGE, LayerCache, PagedCache
from megatron_msa.inference.context import AttentionSettings, CacheContext
from megatron_msa.inference.paged_rows import PagedRows, pages_for


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, all of whose earlier tokens are in the cache or in this piece.

    Attributes:
        number: of the sequence among those that are being prefilled.
        start, stop: positions of the tokens.
        pages: of the sequence.
    """

    number: int
    start: int
    stop: int
    pages: Sequence[int]


def cut(lengths: Sequence[int], pages: Sequence[Sequence[int]], size: int) -> Iterator[list[Piece]]:
    """Cut sequences into chunks of at most ``size`` tokens; short sequences share a chunk.

    Args:
        lengths: tokens of each sequence.
        pages: of each sequence.
        size: tokens of a chunk, 1 or more.
    """
    chunk: list[Piece] = []
    room = size
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            chunk.append(Piece(number, start, stop, pages[number]))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


class PrefillChunk(CacheContext):
    """The forward pass over one chunk.

    Attributes:
        positions: int64 [t], of this rank's tokens in their sequences.
        own: int64 [t], this rank's tokens as places in the chunk, padding included.
        tokens: number of the chunk's tokens, without padding.
        padding: number of tokens behind them, so that all ranks get equally many.
    """

    def __init__(
        self,
        cache: PagedCache,
        settings: AttentionSettings,
        max_sequence_length: int,
        pieces: Sequence[Piece],
    ) -> None:
        super().__init__(cache, settings, max_sequence_length)
        self.pieces = pieces
        self.tokens = sum(piece.stop - piece.start for piece in pieces)
        ranks = settings.cp_size * settings.row_multiple
        self.padding = -self.tokens % ranks
        device = cache.device
        block_size = cache.form.block_size

        positions, page, document = [], [], []
        for number, piece in enumerate(pieces):
            place = torch.arange(piece.start, piece.stop)
            positions.append(place)
            page.append(torch.tensor(piece.pages)[place // block_size])
            document.append(torch.full_like(place, number))
        nothing = torch.zeros(
            self.padding, dtype=torch.int64
        )  # position 0 of document 0, kept on the scratch page
        all_positions = torch.cat([*positions, nothing]).to(device)
        self._page = torch.cat([*page, nothing + SCRATCH_PAGE]).to(device)
        self._offset = all_positions % block_size
        self._prefix_pages = [
            torch.tensor(piece.pages[: pages_for(piece.stop, block_size)], device=device) for piece in pieces
        ]
        self._keys_are_fresh = not any(piece.start for piece in pieces)

        offsets = torch.tensor([0, *(piece.stop for piece in pieces)]).cumsum(0)
        whole = DocumentLayout(
            document_offsets=offsets.to(device, torch.int32),
            query_document=torch.cat([*document, nothing]).to(device, torch.int32),
            query_position=all_positions.to(torch.int32),
            max_document_length=max(piece.stop for piece in pieces),
            queries_are_keys=self._keys_are_fresh and ranks == 1,
        )
        self.own = torch.arange(settings.cp_rank, self.tokens + self.padding, settings.cp_size, device=device)
        self.positions = all_positions[self.own]
        self._layout = whole if settings.cp_size == 1 else whole.select_queries(self.own)

    def is_decode_only(self) -> bool:
        """See Megatron's contexts."""
        return False

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
        key, value, index_key = self._of_all_ranks(key, value, index_key)
        layer.write(self._page, self._offset, key, value, index_key)
        key, value, index_key = self._visible_keys(layer, key, value, index_key)
        query = query.contiguous()
        scale, backend = self.settings.softmax_scale, self.settings.backend
        if index_query is None:
            return dense_kl(query, key, value, self._layout, softmax_scale=scale, backend=backend).out
        assert index_key is not None
        selection = block_select(
            index_query.contiguous(),
            index_key,
            self._layout,
            block_size=self.cache.form.block_size,
            num_selected_blocks=self.settings.num_selected_blocks,
            with_lse=False,
            backend=backend,
        )
        return sparse_attention(
            query,
            key,
            value,
            selection.block_ids,
            self._layout,
            block_size=self.cache.form.block_size,
            softmax_scale=scale,
            backend=backend,
        ).out

    def _visible_keys(
        self, layer: LayerCache, key: Tensor, value: Tensor, index_key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys of the sequences of this chunk, sequence after sequence: [keys, heads, d] each."""

        def visible(rows: PagedRows, fresh: Tensor) -> Tensor:
            if self._keys_are_fresh and rows.scale is None:
                return fresh[: self.tokens].contiguous()
            parts = [
                rows.read(pages, piece.stop, fresh.dtype)
                for pages, piece in zip(self._prefix_pages, self.pieces, strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        index = None
        if layer.index_key is not None and index_key is not None:
            index = visible(layer.index_key, index_key)
        return visible(layer.key, key), visible(layer.value, value), index

    def _of_all_ranks(self, *local: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rows of this rank's tokens -> rows of the chunk's tokens, padding included."""
        size = self.settings.cp_size
        if size == 1:
            return local
        given = [x for x in local if x is not None]
        rows = torch.cat([x.flatten(1) for x in given], dim=1)
        gathered = rows.new_empty(size * rows.shape[0], rows.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, rows, group=self.settings.cp_group)
        # Rank r holds the tokens r, r + C, ...
        in_order = gathered.unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1)
        parts = iter(in_order.split([x[0].numel() for x in given], dim=1))
        return tuple(None if x is None else next(parts).unflatten(1, x.shape[1:]) for x in local)
