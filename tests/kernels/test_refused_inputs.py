"""Every refused input, by its message: value got, what is allowed, what to change."""

import math

import pytest
import torch
from kernel_oracles import packed_layout, random_inputs
from msa_kernels import (
    DocumentLayout,
    block_select,
    debug_checks,
    dense_kl,
    selection_quality,
    sparse_attention,
)

INPUTS = random_inputs(8, dtype=torch.float32)
LAYOUT = packed_layout([3, 5])
RIGHT = {
    "q": INPUTS.q,
    "k": INPUTS.k,
    "v": INPUTS.v,
    "block_ids": torch.tensor([0, -1, -1], dtype=torch.int32).repeat(8, 2, 1),
    "layout": LAYOUT,
    "block_size": 2,
    "index_q": INPUTS.index_q,
    "index_k": INPUTS.index_k,
    "index_lse": torch.zeros(8, 2),
}
OPS = {
    block_select: ("index_q", "index_k", "layout", "block_size"),
    sparse_attention: tuple(RIGHT),
    dense_kl: ("q", "k", "v", "layout", "index_q", "index_k"),
    selection_quality: ("q", "k", "block_ids", "layout", "block_size", "index_q", "index_k"),
}
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def call(op, **changes):
    arguments = {name: RIGHT[name] for name in OPS[op]}
    if op is block_select:
        arguments["num_selected_blocks"] = 3
    return op(**(arguments | changes))


def layout_with(**changes):
    fields = ("document_offsets", "query_document", "query_position", "max_document_length")
    return DocumentLayout(**({name: getattr(LAYOUT, name) for name in fields} | changes))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@every_op
def test_the_unchanged_inputs_are_accepted(op):
    call(op)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", [1.0], TypeError, "q must be a tensor, got list"),
        (
            "q",
            INPUTS.q.int(),
            TypeError,
            "q has dtype torch.int32; supported are torch.bfloat16, torch.float16",
        ),
        ("q", INPUTS.q.to(torch.float8_e4m3fn), TypeError, "q has dtype torch.float8_e4m3fn; supported are"),
        (
            "k",
            INPUTS.k.bfloat16(),
            TypeError,
            "k has dtype torch.bfloat16 but q has torch.float32; cast them",
        ),
        (
            "index_q",
            INPUTS.index_q.double(),
            TypeError,
            "index_q has dtype torch.float64 but q has torch.float32",
        ),
        ("k", INPUTS.k.to("meta"), ValueError, "k is on meta but q is on cpu; move them to one device"),
        (
            "q",
            INPUTS.q[:, 0],
            ValueError,
            r"q must be \[queries, query heads, head dim\].*got shape \[8, 6\]",
        ),
        ("q", INPUTS.q[:, :0], ValueError, r"the last two 1 or more; got shape \[8, 0, 6\]"),
        ("k", INPUTS.k[:, 0], ValueError, r"k must be \[keys, key/value heads, head dim\]"),
        ("v", INPUTS.v[:, 0], ValueError, r"v must be \[keys, key/value heads, value head dim\]"),
        ("k", INPUTS.k[..., :4], ValueError, "q and k must have the same head dim, got 6 and 4"),
        (
            "q",
            INPUTS.q[:, :3],
            ValueError,
            "must be a multiple of the number of key/value heads, got 3 and 2",
        ),
        (
            "v",
            INPUTS.v[:7],
            ValueError,
            r"v must have as many keys and heads as k, got v \[7, 2, 5\] and k \[8, 2, 6\]",
        ),
        ("index_q", None, ValueError, "index_q and index_k come together, but index_q is None"),
        ("index_k", None, ValueError, "index_q and index_k come together, but index_k is None"),
        ("index_q", INPUTS.index_q[:, 0], ValueError, r"index_q must be \[queries, groups, index head dim\]"),
        (
            "index_q",
            INPUTS.index_q[:, :1],
            ValueError,
            r"= \[8, 2, 1 or more\], got \[8, 1, 4\]; give one index query",
        ),
        ("index_q", INPUTS.index_q[:7], ValueError, r"= \[8, 2, 1 or more\], got \[7, 2, 4\]"),
        (
            "index_k",
            INPUTS.k,
            ValueError,
            r"or \[keys, 1, index head dim\], got \[8, 2, 6\]; all groups share one",
        ),
        ("index_k", INPUTS.index_k[:, :3], ValueError, "must have the same index head dim, got 4 and 3"),
        ("index_k", INPUTS.index_k[:7], ValueError, "index_k must have as many keys as k, got 7 and 8"),
        (
            "index_lse",
            torch.zeros(8, 2).double(),
            TypeError,
            "index_lse must be a torch.float32 tensor.*float64",
        ),
        ("index_lse", 0.0, TypeError, "index_lse must be a torch.float32 tensor.*got float"),
        (
            "index_lse",
            torch.zeros(8, 4),
            ValueError,
            r"index_lse must be \[queries, groups\] = \[8, 2\], got \[8, 4\]",
        ),
        (
            "index_lse",
            torch.zeros(8, 2, device="meta"),
            ValueError,
            "index_lse is on meta but index_q is on cpu",
        ),
        (
            "block_ids",
            torch.zeros(8, 2, 3),
            TypeError,
            "block_ids must be an int32 tensor.*got torch.float32",
        ),
        ("block_ids", [[[0]]], TypeError, "block_ids must be an int32 tensor.*got list"),
        ("block_ids", RIGHT["block_ids"][:, :1], ValueError, r"= \[8, 2, 1 or more\], got \[8, 1, 3\]"),
        ("block_ids", RIGHT["block_ids"][..., :0], ValueError, r"= \[8, 2, 1 or more\], got \[8, 2, 0\]"),
        ("block_ids", RIGHT["block_ids"].to("meta"), ValueError, "block_ids is on meta but q is on cpu"),
    ],
)
def test_sparse_attention_refuses(name, value, error, message):
    with pytest.raises(error, match=message):
        call(sparse_attention, **{name: value})


def test_an_index_lse_without_an_index_branch_is_refused():
    with pytest.raises(ValueError, match="index_lse was given without index_q and index_k"):
        call(sparse_attention, index_q=None, index_k=None)


@pytest.mark.parametrize("op", [sparse_attention, dense_kl], ids=lambda op: op.__name__)
def test_an_unknown_kl_teacher_is_refused(op):
    with pytest.raises(ValueError, match="kl_teacher must be one of group_mean, per_head; got 'mean'"):
        call(op, kl_teacher="mean")


@pytest.mark.parametrize("op", [dense_kl, selection_quality], ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("k", INPUTS.k.bfloat16(), TypeError, "k has dtype torch.bfloat16 but q has torch.float32"),
        ("q", INPUTS.q[:, :3], ValueError, "must be a multiple of the number of key/value heads"),
        ("index_q", INPUTS.index_q[:, :1], ValueError, "give one index query head per key/value head"),
        ("k", None, TypeError, "k must be a tensor, got NoneType"),
        ("index_k", None, (TypeError, ValueError), "index_k (is None|must be a tensor, got NoneType)"),
    ],
)
def test_the_other_ops_share_the_checks(op, name, value, error, message):
    with pytest.raises(error, match=message):
        call(op, **{name: value})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index_k": INPUTS.index_k.half()}, TypeError, "index_k has dtype torch.float16 but index_q has"),
        ({"index_k": INPUTS.index_k[:, :2]}, ValueError, "must have the same index head dim, got 4 and 2"),
        ({"index_k": None}, TypeError, "index_k must be a tensor, got NoneType"),
        ({"num_selected_blocks": 0}, ValueError, "num_selected_blocks must be 1 or more, got 0"),
        ({"num_selected_blocks": 2.0}, TypeError, "num_selected_blocks must be an int, got float"),
        ({"score_dtype": "fp8"}, ValueError, "score_dtype must be one of input, e4m3; got 'fp8'"),
        (
            {"score_dtype": "e4m3"},
            ValueError,
            "'e4m3' ranks blocks only and gives no index_lse; pass with_lse",
        ),
    ],
)
def test_block_select_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(block_select, **changes)


@pytest.mark.parametrize(
    "op", [block_select, sparse_attention, selection_quality], ids=lambda op: op.__name__
)
@pytest.mark.parametrize(
    ("block_size", "error", "message"),
    [
        (0, ValueError, "block_size must be 1 or more, got 0"),
        (True, TypeError, "block_size must be an int, got bool"),
        (128.0, TypeError, "block_size must be an int, got float"),
    ],
)
def test_a_block_size_that_is_no_count_is_refused(op, block_size, error, message):
    with pytest.raises(error, match=message):
        call(op, block_size=block_size)


@every_op
@pytest.mark.parametrize(
    ("scale", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (math.inf, ValueError), (torch.tensor(0.5), TypeError)],
)
def test_a_scale_that_is_no_positive_number_is_refused(op, scale, error):
    with pytest.raises(error, match="softmax_scale must be"):
        call(op, softmax_scale=scale)
    if op is not block_select:
        with pytest.raises(error, match="index_softmax_scale must be"):
            call(op, index_softmax_scale=scale)


@every_op
@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        (LAYOUT.document_offsets, TypeError, "layout must be a DocumentLayout, got Tensor"),
        (
            LAYOUT.select_queries(slice(0, 7)),
            ValueError,
            "layout describes 7 queries but there are 8; use layout.sel",
        ),
        (layout_with(document_offsets=int32(0, 3, 9)), ValueError, "layout describes 9 keys but there are 8"),
        (
            layout_with(document_offsets=int32(1, 3, 8)),
            ValueError,
            r"must start with 0 and never fall, got \[1, 3, 8\]",
        ),
        (layout_with(document_offsets=int32(0, 9, 8)), ValueError, "must start with 0 and never fall"),
        (
            layout_with(max_document_length=4),
            ValueError,
            "max_document_length is 4 but a document has 5 tokens",
        ),
        (
            layout_with(query_document=int32(0, 0, 0, 1, 1, 1, 1, 2)),
            ValueError,
            r"query_document must be 0 \.\. 1, got 0 \.\. 2",
        ),
        (
            layout_with(query_position=int32(0, 1, 2, 0, 1, 2, 3, 5)),
            ValueError,
            "query 7 has position 5 in document 1, which has 5 tokens",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(op, layout, error, message):
    with pytest.raises(error, match=message):
        call(op, layout=layout)


def test_a_layout_on_another_device_is_refused():
    names = ("document_offsets", "query_document", "query_position")
    elsewhere = layout_with(**{name: getattr(LAYOUT, name).to("meta") for name in names})
    with pytest.raises(ValueError, match="layout is on meta but the inputs are on cpu; build it on cpu"):
        call(dense_kl, layout=elsewhere)


@every_op
@pytest.mark.parametrize("offsets", [[0, 0], [0]], ids=["an empty document", "no document"])
def test_a_call_without_keys_is_refused(op, offsets):
    nothing = {"layout": DocumentLayout.from_document_offsets(torch.tensor(offsets))}
    for name in ("q", "k", "v", "index_q", "index_k", "block_ids", "index_lse"):
        if name in OPS[op]:
            nothing[name] = RIGHT[name][:0]
    with pytest.raises(ValueError, match="there are no keys; skip the call"):
        call(op, **nothing)


def ids_with(query, group, *row):
    block_ids = RIGHT["block_ids"].clone()
    block_ids[query, group] = int32(*row)
    return block_ids


@pytest.mark.parametrize("op", [sparse_attention, selection_quality], ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("block_ids", "message"),
    [
        # Query 6 is at position 3 of document 1: blocks of 2 tokens 0 and 1.
        (
            ids_with(6, 1, 0, 2, -1),
            r"block_ids\[6, 1, 1\] is 2: query 6, at position 3 .* sees blocks 0 \.\. 1",
        ),
        (
            ids_with(1, 0, 0, 1, -1),
            r"block_ids\[1, 0, 1\] is 1: query 1, at position 1 .* sees blocks 0 \.\. 0",
        ),
        (ids_with(7, 0, 0, 1, -2), r"block_ids\[7, 0, 2\] is -2: query 7"),
        (ids_with(7, 1, 1, 0, 1), r"block 1 more than once for query 7, group 1: \[1, 0, 1\]"),
        (ids_with(7, 1, 1, -1, 0), r"block_ids\[7, 1, 2\] is 0 behind the padding -1 \(query 7, group 1\)"),
    ],
)
def test_block_ids_that_name_no_visible_block_or_one_twice_are_refused(op, block_ids, message):
    with pytest.raises(ValueError, match=message):
        call(op, block_ids=block_ids)


@pytest.mark.parametrize(
    "row", [(0, 1, 2), (2, 0, 1), (1, -1, -1), (-1, -1, -1)], ids=["all", "any order", "padded", "nothing"]
)
def test_rows_of_distinct_visible_blocks_are_accepted(row):
    call(sparse_attention, block_ids=ids_with(7, 1, *row))


@every_op
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_debug_mode_refuses_numbers_that_are_not_finite(op, value, monkeypatch):
    name = "index_q" if op is block_select else "q"
    tensor = RIGHT[name].clone()
    tensor[5, 1, 2] = value
    call(op, **{name: tensor})
    with debug_checks(), pytest.raises(ValueError, match=rf"{name}\[5, 1, 2\] is {value}; .* finite"):
        call(op, **{name: tensor})
    monkeypatch.setenv("MSA_DEBUG_CHECKS", "1")
    with pytest.raises(ValueError, match="finite"):
        call(op, **{name: tensor})
    with debug_checks(False):
        call(op, **{name: tensor})
    monkeypatch.setenv("MSA_DEBUG_CHECKS", "0")
    call(op, **{name: tensor})


def on_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, DocumentLayout):
        names = ("document_offsets", "query_document", "query_position")
        tensors = {name: getattr(value, name).cuda() for name in names}
        return DocumentLayout(max_document_length=value.max_document_length, **tensors)
    return value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_ids": ids_with(6, 1, 0, 2, -1)}, r"block_ids\[6, 1, 1\] is 2"),
        ({"block_ids": ids_with(7, 1, 1, 0, 1)}, "more than once for query 7, group 1"),
        ({"layout": layout_with(document_offsets=int32(0, 3, 9))}, "layout describes 9 keys but there are 8"),
        ({"v": INPUTS.v / 0}, r"v\[0, 0, 0\] is (nan|-?inf)"),
    ],
)
def test_on_a_gpu_values_are_read_in_debug_mode_only(changes, message):
    arguments = {name: on_gpu(value) for name, value in (RIGHT | changes).items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with debug_checks(), pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)


@every_op
def test_a_call_without_queries_gives_empty_results(op):
    no_queries = {"layout": LAYOUT.select_queries(slice(0, 0))}
    for name in ("q", "index_q", "block_ids", "index_lse"):
        if name in OPS[op]:
            no_queries[name] = RIGHT[name][:0]
    results = call(op, **no_queries)
    assert all(tensor.shape[0] == 0 for tensor in results)
