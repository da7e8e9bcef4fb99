"""Input checks of the decode ops. Nothing here reads a value from a GPU, but in debug mode."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_kernels.common import value_checks

MAX_QUERIES = 16
"""New tokens per sequence. More are a prefill: block_select and sparse_attention are made for that."""

EIGHT_BIT = torch.float8_e4m3fn


def check_index_shapes(index_query: Tensor, index_key_cache: Tensor) -> None:
    """Raises TypeError or ValueError unless they are [S, q_len, groups, d_i] and [pages, B, d_i]."""
    _check_tensor("index_key_cache", index_key_cache)
    _check_queries("index_query", index_query, "[sequences, new tokens, groups, index head dim]")
    _check_dimensions("index_key_cache", index_key_cache, "[pages, block size, index head dim]")
    if index_key_cache.shape[2] != index_query.shape[3]:
        raise ValueError(
            "index_query and index_key_cache must have the same index head dim, "
            f"got {index_query.shape[3]} and {index_key_cache.shape[2]}"
        )


def check_attention_shapes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raises TypeError or ValueError unless query is [S, q_len, heads, d] and the caches fit it."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _check_tensor(name, cache)
        _check_dimensions(name, cache, "[pages, groups, block size, head dim]")
    _check_queries("query", query, "[sequences, new tokens, heads, head dim]")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            "value_cache must have the pages, groups and block size of key_cache, "
            f"got {list(value_cache.shape)} and {list(key_cache.shape)}"
        )
    if key_cache.shape[3] != query.shape[3]:
        raise ValueError(
            f"query and key_cache must have the same head dim, got {query.shape[3]} and {key_cache.shape[3]}"
        )
    if query.shape[2] % key_cache.shape[1]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of groups, "
            f"got {query.shape[2]} and {key_cache.shape[1]}"
        )


def check_cache(name: str, cache: Tensor, scale: Tensor | None, query: Tensor) -> None:
    """Raises TypeError or ValueError unless a cache has the dtype of the queries, or 8 bits and scales.

    Args:
        name: of the cache, without "_cache".
        cache: [..., B, dim].
        scale: fp32, one per row of ``cache``, for 8 bits.
        query: its dtype and device are those of all caches.
    """
    if cache.dtype not in (query.dtype, EIGHT_BIT):
        raise TypeError(
            f"{name}_cache has dtype {cache.dtype}; supported are that of the queries, {query.dtype}, and "
            f"{EIGHT_BIT} with {name}_scale"
        )
    if cache.device != query.device:
        raise ValueError(
            f"{name}_cache is on {cache.device} but the queries are on {query.device}; "
            "move them to one device"
        )
    if not cache.is_contiguous():
        raise ValueError(
            f"{name}_cache has shape {list(cache.shape)} with strides {list(cache.stride())}; allocate it "
            "contiguous: a copy at every step would cost more than the attention"
        )
    if cache.dtype != EIGHT_BIT:
        if scale is not None:
            raise ValueError(f"{name}_scale belongs to a cache of {EIGHT_BIT}, but it is {cache.dtype}")
        return
    if scale is None:
        raise ValueError(f"{name}_cache is {EIGHT_BIT}: give its {name}_scale, one fp32 number per row")
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        raise TypeError(f"{name}_scale must be a torch.float32 tensor, got {_kind(scale)}")
    if scale.shape != cache.shape[:-1]:
        raise ValueError(f"{name}_scale must be {list(cache.shape[:-1])}, got {list(scale.shape)}")
    if scale.device != cache.device:
        raise ValueError(
            f"{name}_scale is on {scale.device} but {name}_cache is on {cache.device}; "
            "move them to one device"
        )
    if not scale.is_contiguous():
        raise ValueError(f"{name}_scale has strides {list(scale.stride())}; allocate it contiguous")


def check_sequences(
    page_table: Tensor, lengths: Tensor, query: Tensor, *, num_pages: int, block_size: int
) -> None:
    """Raises TypeError or ValueError unless page table and lengths describe sequences of the cache.

    Args:
        page_table: int32 [S, N].
        lengths: int32 [S].
        query: [S, ...], for S and the device.
        num_pages: of the cache.
        block_size: tokens of a page.
    """
    for name, tensor, shape in (
        ("page_table", page_table, "[sequences, most pages of a sequence]"),
        ("lengths", lengths, "[sequences]"),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {_kind(tensor)}")
        if tensor.dim() != shape.count(",") + 1 or tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must be {shape} with {query.shape[0]} sequences, got {list(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} but the queries are on {query.device}; move them to one device"
            )
    if page_table.shape[1] < 1:
        raise ValueError("page_table has no columns; give every sequence room for one page or more")
    if not value_checks.may_read(query.device):
        return
    most = page_table.shape[1] * block_size
    if (place := value_checks.first_place((lengths < 0) | (lengths > most))) is not None:
        raise ValueError(
            f"lengths{place} is {int(lengths[place[0]])}; page_table has {page_table.shape[1]} pages of "
            f"{block_size} tokens for a sequence, so it must be 0 .. {most}"
        )
    block = torch.arange(page_table.shape[1], device=page_table.device)
    is_used = block * block_size < lengths[:, None]
    if (
        place := value_checks.first_place(is_used & ((page_table < 0) | (page_table >= num_pages)))
    ) is not None:
        raise ValueError(
            f"page_table{place} is {int(page_table[tuple(place)])}; the cache has pages 0 .. {num_pages - 1}"
        )


def check_block_ids(
    block_ids: Tensor, query: Tensor, lengths: Tensor, *, groups: int, block_size: int
) -> None:
    """Raises TypeError or ValueError unless block_ids is int32 [S, q_len, groups, slots], visible blocks."""
    if not isinstance(block_ids, Tensor) or block_ids.dtype != torch.int32:
        raise TypeError(
            f"block_ids must be an int32 tensor as decode_select returns it, got {_kind(block_ids)}"
        )
    wanted = (*query.shape[:2], groups)
    if block_ids.dim() != 4 or block_ids.shape[:3] != wanted or block_ids.shape[3] < 1:
        raise ValueError(
            f"block_ids must be [sequences, new tokens, groups, slots] = [{', '.join(map(str, wanted))}, "
            f"1 or more], got {list(block_ids.shape)}"
        )
    if block_ids.device != query.device:
        raise ValueError(
            f"block_ids is on {block_ids.device} but the queries are on {query.device}; "
            "move them to one device"
        )
    if not value_checks.may_read(block_ids.device):
        return
    position = query_positions(lengths, query.shape[1])
    local = (position // block_size).clamp(min=-1)[:, :, None, None]
    if (place := value_checks.first_place((block_ids < -1) | (block_ids > local))) is not None:
        raise ValueError(
            f"block_ids{place} is {int(block_ids[tuple(place)])}; query {place[1]} of sequence {place[0]} "
            f"sees blocks 0 .. {int(local[place[0], place[1]])} of {block_size} tokens; -1 is padding"
        )
    if (place := value_checks.first_place((block_ids[..., 1:] >= 0) & (block_ids[..., :-1] < 0))) is not None:
        raise ValueError(
            f"block_ids[{', '.join(map(str, place[:3]))}] has a block behind the padding -1; put the valid "
            "entries first"
        )
    ordered = block_ids.sort(dim=-1).values
    repeats = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if (place := value_checks.first_place(repeats)) is not None:
        raise ValueError(
            f"block_ids[{', '.join(map(str, place[:3]))}] names block {int(ordered[tuple(place)])} more than "
            "once; entries of a row must differ"
        )


def query_positions(lengths: Tensor, q_len: int) -> Tensor:
    """Positions of the new tokens, int32 [S, q_len]; below 0 for places without a token."""
    new = torch.arange(q_len, dtype=torch.int32, device=lengths.device)
    return lengths[:, None] - q_len + new


def _check_queries(name: str, tensor: Tensor, meaning: str) -> None:
    _check_dimensions(name, tensor, meaning)
    if tensor.shape[1] > MAX_QUERIES:
        raise ValueError(
            f"{name} has {tensor.shape[1]} new tokens per sequence; decoding takes 1 .. {MAX_QUERIES}, use "
            "block_select and sparse_attention for a prefill"
        )


def _check_dimensions(name: str, tensor: Tensor, meaning: str) -> None:
    if tensor.dim() != meaning.count(",") + 1 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{name} must be {meaning}, all but the first 1 or more; got shape {list(tensor.shape)}"
        )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
