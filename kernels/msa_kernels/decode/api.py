"""The public ops: their meaning, their checks, their choice of backend.

Letters in shapes: S sequences, q_len new tokens per sequence, N most pages of a sequence, B block size.
"""

from __future__ import annotations

from torch import Tensor

from msa_kernels.common import checks
from msa_kernels.common.backend import Backend, Implementation, Op
from msa_kernels.common.compilation import outside_graphs
from msa_kernels.decode import checks as decode_checks
from msa_kernels.decode.reference import decode_attention_reference, decode_select_reference


def _load_select() -> Implementation:
    from msa_kernels.decode.triton_select import IMPLEMENTATION

    return IMPLEMENTATION


def _load_attention() -> Implementation:
    from msa_kernels.decode.triton_attention import IMPLEMENTATION

    return IMPLEMENTATION


_SELECT = Op(name="decode_select", reference=decode_select_reference, triton=_load_select)
_ATTENTION = Op(name="decode_attention", reference=decode_attention_reference, triton=_load_attention)


@outside_graphs
def decode_select(
    index_query: Tensor,
    index_key_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    index_key_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Chooses, for every new token and group, the blocks of the cache that attention reads.

    A page holds one block: block j of sequence s is page page_table[s, j]. Query t of a sequence stands at
    position lengths - q_len + t and sees the tokens up to its own. The rule is that of ``block_select``: the
    score of a block is its largest index_query . index_key; the local block is always taken and uses one of
    the slots; equal scores go to the lower block id; a NaN score of a token counts as -inf.

    Args:
        index_query: [S, q_len, groups, d_i], q_len 1 .. 16; bf16, fp16, fp32 or fp64.
        index_key_cache: [pages, B, d_i], the index keys of the new tokens included, contiguous; the dtype of
            index_query, or float8_e4m3fn with index_key_scale: less to read, and some blocks differ
            (README.md has measurements).
        page_table: int32 [S, N], the page of each block. Entries behind a sequence's last page are not used.
        lengths: int32 [S], tokens in the cache, the new ones included. A sequence of length 0 is an unused
            place of the batch. Rows of queries that would stand before position 0 are all -1.
        top_k: slots per query and group, the local block included.
        index_key_scale: fp32 [pages, B], positive, for an 8-bit cache: index key = value * scale.
        backend: "triton", "reference", or "auto" for Triton where it can run.

    Returns:
        block_ids, int32 [S, q_len, groups, top_k]: block numbers within the sequence, the local block last
        among the valid entries, -1 behind it. The order of the other entries is free.

    Raises:
        TypeError: wrong type or dtype of an input, or mixed dtypes.
        ValueError: wrong shape, device or value of an input.
        RuntimeError: backend is "triton" and Triton cannot run these inputs.
    """
    checks.check_tensors({"index_query": index_query})
    decode_checks.check_index_shapes(index_query, index_key_cache)
    decode_checks.check_cache("index_key", index_key_cache, index_key_scale, index_query)
    decode_checks.check_sequences(
        page_table, lengths, index_query, num_pages=len(index_key_cache), block_size=index_key_cache.shape[1]
    )
    checks.check_count("top_k", top_k)
    return _SELECT.run(
        backend,
        index_query,
        index_key_cache,
        page_table,
        lengths,
        top_k=top_k,
        index_key_scale=index_key_scale,
    )


@outside_graphs
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    block_ids: Tensor | None,
    *,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of the new tokens over chosen blocks of the cache, or over all of it.

    Pages and positions are those of ``decode_select``. Query head h of group r attends to the tokens that it
    sees in the blocks that r chose (arXiv 2606.13392), with the weights softmax(scale * query . key).

    Args:
        query: [S, q_len, heads, d], q_len 1 .. 16; bf16, fp16, fp32 or fp64. Heads r*G .. r*G+G-1 belong to
            group r, G = heads / groups.
        key_cache: [pages, groups, B, d], the new tokens included, contiguous; the dtype of query, or
            float8_e4m3fn with key_scale.
        value_cache: [pages, groups, B, d_v], as key_cache; each of the two may have 8 bits.
        page_table: int32 [S, N], the page of each block. Entries behind a sequence's last page are not used.
        lengths: int32 [S], tokens in the cache, the new ones included. The output of a sequence of length 0
            is 0, and so is that of queries that would stand before position 0.
        block_ids: int32 [S, q_len, groups, slots] as ``decode_select`` returns them: visible to the query,
            distinct, -1 behind them. Checked on the CPU and in debug mode (``debug_checks``). None for all
            visible tokens: dense attention.
        scale: factor on the scores, 1 / sqrt(d) if None.
        key_scale: fp32 [pages, groups, B] for an 8-bit key cache: key = value * scale.
        value_scale: the same for the value cache.
        backend: "triton", "reference", or "auto" for Triton where it can run.

    Returns:
        output, [S, q_len, heads, d_v] in the dtype of query. No gradient.

    Raises:
        TypeError: wrong type or dtype of an input, or mixed dtypes.
        ValueError: wrong shape, device or value of an input.
        RuntimeError: backend is "triton" and Triton cannot run these inputs.
    """
    checks.check_tensors({"query": query})
    decode_checks.check_attention_shapes(query, key_cache, value_cache)
    decode_checks.check_cache("key", key_cache, key_scale, query)
    decode_checks.check_cache("value", value_cache, value_scale, query)
    groups, block_size = key_cache.shape[1:3]
    decode_checks.check_sequences(page_table, lengths, query, num_pages=len(key_cache), block_size=block_size)
    if block_ids is not None:
        decode_checks.check_block_ids(block_ids, query, lengths, groups=groups, block_size=block_size)
    return _ATTENTION.run(
        backend,
        query,
        key_cache,
        value_cache,
        page_table,
        lengths,
        block_ids,
        scale=checks.resolve_scale("scale", scale, query.shape[3]),
        key_scale=key_scale,
        value_scale=value_scale,
    )
