"""Decoding over a paged cache: what block_select and sparse_attention give for the same tokens."""

import math

import pytest
import torch
from decode_inputs import decoding, in_8_bits
from msa_kernels import (
    DocumentLayout,
    block_select,
    debug_checks,
    decode_attention,
    decode_select,
    dense_kl,
    sparse_attention,
)

# Odd lengths, whole pages, a page boundary between the new tokens, unused places, one token; blocks of 4.
LENGTHS = [0, 1, 33, 16, 17, 0, 45, 4, 3]
CASES = [
    # new tokens, heads, groups, slots
    (1, 4, 2, 3),
    (3, 6, 2, 4),
    (16, 3, 1, 2),
    (2, 4, 4, 16),
    (5, 2, 1, 1),
]
cases = pytest.mark.parametrize(("q_len", "heads", "groups", "slots"), CASES)


def new_tokens(inputs, sequence):
    """Layout of the new tokens that exist, and their places in the batch."""
    length, q_len = int(inputs.lengths[sequence]), inputs.query.shape[1]
    count = min(q_len, length)
    layout = DocumentLayout.dense_batch(1, length).select_queries(slice(length - count, length))
    return layout, slice(q_len - count, q_len)


def sequences(inputs):
    return [sequence for sequence, length in enumerate(inputs.lengths.tolist()) if length]


@pytest.mark.parametrize("ties", [False, True])
@cases
def test_the_selection_is_that_of_block_select(q_len, heads, groups, slots, ties):
    inputs = decoding(LENGTHS, q_len=q_len, heads=heads, groups=groups, ties=ties)
    found = decode_select(*inputs.select, top_k=slots, backend="reference")
    assert found.dtype == torch.int32
    assert found.shape == (len(LENGTHS), q_len, groups, slots)
    seen = torch.zeros(found.shape[:2], dtype=torch.bool)
    for sequence in sequences(inputs):
        layout, new = new_tokens(inputs, sequence)
        expected = block_select(
            inputs.index_query[sequence, new],
            inputs.index_keys[sequence],
            layout,
            block_size=4,
            num_selected_blocks=slots,
            backend="reference",
        )
        assert torch.equal(found[sequence, new], expected.block_ids)
        seen[sequence, new] = True
    assert (found[~seen] == -1).all()


@cases
def test_attention_over_the_chosen_blocks_is_that_of_sparse_attention(q_len, heads, groups, slots):
    inputs = decoding(LENGTHS, q_len=q_len, heads=heads, groups=groups)
    block_ids = decode_select(*inputs.select, top_k=slots, backend="reference")
    found = decode_attention(*inputs.attend, block_ids, scale=0.3, backend="reference")
    seen = torch.zeros(found.shape[:2], dtype=torch.bool)
    for sequence in sequences(inputs):
        layout, new = new_tokens(inputs, sequence)
        expected = sparse_attention(
            inputs.query[sequence, new],
            inputs.keys[sequence].transpose(0, 1),
            inputs.values[sequence].transpose(0, 1),
            block_ids[sequence, new],
            layout,
            block_size=4,
            softmax_scale=0.3,
            backend="reference",
        )
        torch.testing.assert_close(found[sequence, new], expected.out, rtol=1e-12, atol=1e-12)
        seen[sequence, new] = True
    assert (found[~seen] == 0).all()


@cases
def test_without_blocks_it_is_dense_attention(q_len, heads, groups, slots):
    inputs = decoding(LENGTHS, q_len=q_len, heads=heads, groups=groups)
    found = decode_attention(*inputs.attend, None, backend="reference")
    assert (found[inputs.lengths == 0] == 0).all()
    for sequence in sequences(inputs):
        layout, new = new_tokens(inputs, sequence)
        expected = dense_kl(
            inputs.query[sequence, new],
            inputs.keys[sequence].transpose(0, 1),
            inputs.values[sequence].transpose(0, 1),
            layout,
            backend="reference",
        )
        torch.testing.assert_close(found[sequence, new], expected.out, rtol=1e-12, atol=1e-12)


def test_8_bit_caches_give_what_their_values_times_scales_give():
    inputs = decoding(LENGTHS, q_len=3, dtype=torch.float32)
    index_keys, index_scale = in_8_bits(inputs.index_key_cache)
    keys, key_scale = in_8_bits(inputs.key_cache)
    values, value_scale = in_8_bits(inputs.value_cache)
    found = decode_select(
        inputs.index_query, index_keys, *inputs.select[2:], top_k=3, index_key_scale=index_scale
    )
    wide = index_keys.float() * index_scale[..., None]
    assert torch.equal(found, decode_select(inputs.index_query, wide, *inputs.select[2:], top_k=3))
    for block_ids in (found, None):
        output = decode_attention(
            inputs.query,
            keys,
            values,
            *inputs.attend[3:],
            block_ids,
            key_scale=key_scale,
            value_scale=value_scale,
        )
        wide_caches = keys.float() * key_scale[..., None], values.float() * value_scale[..., None]
        expected = decode_attention(inputs.query, *wide_caches, *inputs.attend[3:], block_ids)
        assert torch.equal(output, expected)
        of_values_alone = decode_attention(
            inputs.query, wide_caches[0], values, *inputs.attend[3:], block_ids, value_scale=value_scale
        )
        assert torch.equal(of_values_alone, expected)


def test_nan_scores_rank_last_and_equal_scores_go_to_the_lower_block():
    inputs = decoding([41], ties=True)
    pages = inputs.page_table[0].long()
    inputs.index_key_cache[pages[:10]] = 0
    inputs.index_key_cache[pages[2], 1] = math.nan  # one of its tokens
    inputs.index_key_cache[pages[0]] = math.nan  # all of them
    found = decode_select(*inputs.select, top_k=4, backend="reference")
    assert found[0, 0].tolist() == [[1, 2, 3, 10]] * 2


def test_no_sequences_give_empty_results():
    inputs = decoding([5])
    select = inputs.index_query[:0], inputs.index_key_cache, inputs.page_table[:0], inputs.lengths[:0]
    block_ids = decode_select(*select, top_k=3)
    assert block_ids.shape == (0, 1, 2, 3)
    caches = inputs.key_cache, inputs.value_cache, inputs.page_table[:0], inputs.lengths[:0]
    assert decode_attention(inputs.query[:0], *caches, block_ids).shape == (0, 1, 4, 6)


INPUTS = decoding([9, 2], q_len=2, dtype=torch.float32)
IDS = decode_select(*INPUTS.select, top_k=3)
SELECT = dict(
    zip(("index_query", "index_key_cache", "page_table", "lengths"), INPUTS.select, strict=True), top_k=3
)
ATTEND = dict(
    zip(("query", "key_cache", "value_cache", "page_table", "lengths"), INPUTS.attend, strict=True),
    block_ids=IDS,
)
KEYS_8, SCALE_8 = in_8_bits(INPUTS.key_cache)


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index_query": 3}, TypeError, "index_query must be a tensor, got int"),
        ({"index_key_cache": None}, TypeError, "index_key_cache must be a tensor, got NoneType"),
        (
            {"index_query": INPUTS.index_query.int()},
            TypeError,
            "index_query has dtype torch.int32; supported are",
        ),
        (
            {"index_key_cache": INPUTS.index_key_cache.half()},
            TypeError,
            "supported are that of the queries, torch.float32, and torch.float8_e4m3fn with index_key_scale",
        ),
        (
            {"index_query": INPUTS.index_query.repeat(1, 9, 1, 1)},
            ValueError,
            "has 18 new tokens per sequence; decoding takes 1 .. 16, use block_select",
        ),
        (
            {"index_query": INPUTS.index_query[:, :, 0]},
            ValueError,
            r"index_query must be \[sequences, new tokens, groups, index head dim\], all but the first",
        ),
        (
            {"index_query": INPUTS.index_query[..., :3].contiguous()},
            ValueError,
            "same index head dim, got 3 and 5",
        ),
        (
            {"index_key_cache": INPUTS.index_key_cache.mT.contiguous().mT},
            ValueError,
            "allocate it contiguous: a copy at every step",
        ),
        ({"top_k": 0}, ValueError, "top_k must be 1 or more, got 0"),
        ({"lengths": INPUTS.lengths.long()}, TypeError, "lengths must be an int32 tensor, got torch.int64"),
        (
            {"lengths": INPUTS.lengths[:1]},
            ValueError,
            r"lengths must be \[sequences\] with 2 sequences, got \[1\]",
        ),
        ({"page_table": INPUTS.page_table[0]}, ValueError, r"page_table must be \[sequences, most pages"),
        ({"page_table": INPUTS.page_table[:, :0]}, ValueError, "page_table has no columns; give every"),
        (
            {"lengths": torch.tensor([17, 2], dtype=torch.int32)},
            ValueError,
            r"lengths\[0\] is 17; page_table has 4 pages of 4 tokens for a sequence, so it must be 0 .. 16",
        ),
        (
            {"page_table": changed(INPUTS.page_table, (0, 2), 6)},
            ValueError,
            r"page_table\[0, 2\] is 6; the cache has pages 0 .. 5",
        ),
        (
            {"index_key_scale": SCALE_8},
            ValueError,
            "index_key_scale belongs to a cache of torch.float8_e4m3fn",
        ),
        (
            {"index_key_cache": in_8_bits(INPUTS.index_key_cache)[0]},
            ValueError,
            "is torch.float8_e4m3fn: give its index_key_scale, one fp32 number per row",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_inputs_of_the_selection_that_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        decode_select(**(SELECT | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": INPUTS.query[:, :, :3]}, ValueError, "multiple of the number of groups, got 3 and 2"),
        (
            {"query": INPUTS.query[..., :4].contiguous()},
            ValueError,
            "query and key_cache must have the same head dim, got 4 and 6",
        ),
        (
            {"value_cache": INPUTS.value_cache[:5]},
            ValueError,
            "value_cache must have the pages, groups and block size of key_cache",
        ),
        ({"key_cache": INPUTS.key_cache[0]}, ValueError, r"key_cache must be \[pages, groups, block size"),
        ({"key_cache": KEYS_8, "key_scale": SCALE_8.half()}, TypeError, "key_scale must be a torch.float32"),
        (
            {"key_cache": KEYS_8, "key_scale": SCALE_8[:, :1]},
            ValueError,
            r"key_scale must be \[6, 2, 4\], got \[6, 1, 4\]",
        ),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"block_ids": IDS.long()}, TypeError, "block_ids must be an int32 tensor as decode_select returns"),
        (
            {"block_ids": IDS[:, :1]},
            ValueError,
            r"= \[2, 2, 2, 1 or more\], got \[2, 1, 2, 3\]",
        ),
        (
            {"block_ids": changed(IDS, (1, 0, 0, 0), 1)},
            ValueError,
            r"block_ids\[1, 0, 0, 0\] is 1; query 0 of sequence 1 sees blocks 0 .. 0 of 4 tokens",
        ),
        (
            {"block_ids": changed(IDS, (0, 1, 1, 0), -1)},
            ValueError,
            r"block_ids\[0, 1, 1\] has a block behind the padding -1",
        ),
        (
            {"block_ids": changed(IDS, (0, 1, 1), 1)},
            ValueError,
            r"block_ids\[0, 1, 1\] names block 1 more than once",
        ),
        ({"lengths": INPUTS.lengths.to("meta")}, ValueError, "lengths is on meta but the queries are on cpu"),
    ],
)
def test_inputs_of_the_attention_that_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        decode_attention(**(ATTEND | changes))


def test_the_unchanged_inputs_are_accepted_in_debug_mode_too():
    with debug_checks():
        decode_attention(**(ATTEND | {"block_ids": decode_select(**SELECT)}))
