"""The Triton kernels of block_select against the reference.

Where they run: see `triton_interpreter`.
"""

import math

import pytest
import torch
from kernel_oracles import packed_layout
from msa_kernels import DocumentLayout, block_select
from msa_kernels.block_select import e4m3
from msa_kernels.common.outputs import BlockSelection
from triton_interpreter import DEVICE, needs_triton, slow_in_interpreter

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


pytestmark = pytest.mark.usefixtures("poisoned_buffers")


def integer_inputs(num_keys, groups, dim, dtype=torch.bfloat16, seed=0):
    """Scores that are small integers: exact in any order of summation, with ties nearly everywhere."""
    generator = torch.Generator().manual_seed(seed)
    index_q = torch.randint(-1, 2, (num_keys, groups, dim), generator=generator)
    index_k = torch.randint(-1, 2, (num_keys, dim), generator=generator)
    index_k *= torch.rand(num_keys, dim, generator=generator) < 0.05
    return index_q.to(DEVICE, dtype), index_k.to(DEVICE, dtype)


def random_index(num_keys, groups, dim, dtype=torch.bfloat16, seed=0):
    """Normal values; the factor, a power of two, brings the scores to the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    index_q = torch.randn(num_keys, groups, dim, generator=generator) / 8
    index_k = torch.randn(num_keys, dim, generator=generator)
    return index_q.to(DEVICE, dtype), index_k.to(DEVICE, dtype)


def layout_of(lengths):
    layout = packed_layout(lengths)
    names = ("document_offsets", "query_document", "query_position")
    return DocumentLayout(
        **{name: getattr(layout, name).to(DEVICE) for name in names},
        max_document_length=layout.max_document_length,
    )


def both(index_q, index_k, layout, block_size, count, **options) -> tuple[BlockSelection, BlockSelection]:
    options |= {"block_size": block_size, "num_selected_blocks": count}
    return (
        block_select(index_q, index_k, layout, backend="triton", **options),
        block_select(index_q, index_k, layout, backend="reference", **options),
    )


def assert_form(block_ids, layout, block_size, count):
    """Distinct blocks before the local one, the local block last among the valid entries, -1 behind it."""
    assert block_ids.dtype == torch.int32
    local = (layout.query_position // block_size)[:, None, None]
    num_others = local.clamp(max=count - 1)
    slot = torch.arange(count, device=block_ids.device)
    assert ((block_ids >= 0) & (block_ids < local))[(slot < num_others).expand_as(block_ids)].all()
    assert (block_ids == local)[(slot == num_others).expand_as(block_ids)].all()
    assert (block_ids == -1)[(slot > num_others).expand_as(block_ids)].all()
    in_order = block_ids.sort(dim=-1).values
    assert ((in_order[..., 1:] > in_order[..., :-1]) | (in_order[..., :-1] == -1)).all()


def assert_same_blocks(found, expected):
    assert torch.equal(found.block_ids.sort(dim=-1).values, expected.block_ids.sort(dim=-1).values)


def chosen_tokens(block_ids, layout, num_keys, block_size):
    """bool [Q, groups, K]: the visible tokens of the chosen blocks."""
    num_blocks = max(1, layout.max_blocks(block_size))
    taken = torch.zeros(*block_ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=block_ids.device)
    taken.scatter_(2, torch.where(block_ids < 0, num_blocks, block_ids).long(), True)
    key_block = (layout.key_position(num_keys) // block_size).long()
    return taken[:, :, key_block] & layout.visible_keys(num_keys)[:, None]


def lse_in(dtype, index_q, index_k, chosen):
    """logsumexp over the chosen tokens, every step rounded to ``dtype``."""
    scores = torch.einsum("qrd,kd->qrk", index_q.to(dtype), index_k.to(dtype)) * index_q.shape[2] ** -0.5
    return scores.masked_fill(~chosen, -torch.inf).logsumexp(dim=-1).double()


def assert_lse_is_right(selection, index_q, index_k, layout, block_size):
    """At most twice the error of PyTorch in the inputs' dtype, and a few roundings of fp32 besides."""
    assert selection.index_lse.dtype == torch.float32
    chosen = chosen_tokens(selection.block_ids, layout, index_k.shape[0], block_size)
    exact = lse_in(torch.float64, index_q, index_k, chosen)
    error = (selection.index_lse.double() - exact).abs().amax()
    same_dtype_error = (lse_in(index_q.dtype, index_q, index_k, chosen) - exact).abs().amax()
    assert error <= max(2 * same_dtype_error, 1e-6)
    assert error <= 1e-5


def assert_differs_only_in_near_ties(
    found, expected, index_q, index_k, layout, block_size, *, closer_than=1e-5, share=0.001
):
    """Where a row's blocks differ, the scores of the blocks in question lie within ``closer_than``.

    All products of 16-bit inputs are exact in fp32; their sums are not, and the two sides add in different
    orders. With scores of the order of 1 the sums differ by a few 1e-7. At most a ``share`` of the rows
    differs.
    """
    found_ids = found.block_ids.sort(dim=-1).values
    expected_ids = expected.block_ids.sort(dim=-1).values
    rows = (found_ids != expected_ids).any(dim=-1).nonzero().tolist()
    assert len(rows) <= share * found_ids.shape[0] * found_ids.shape[1]
    for query, group in rows:
        document = int(layout.query_document[query])
        start = int(layout.document_offsets[document])
        in_question = set(found_ids[query, group].tolist()) ^ set(expected_ids[query, group].tolist())
        scores = []
        for block in in_question:
            keys = index_k[start + block * block_size : start + (block + 1) * block_size].double()
            scores.append(float((keys @ index_q[query, group].double()).max()))
        assert max(scores) - min(scores) <= closer_than


def rounded(vectors):
    values, scales = e4m3.quantise(vectors)
    return values.double() * scales[..., None]


CASES = [
    # document lengths, groups, d_i, block size, blocks to select
    ([1], 4, 128, 128, 16),
    ([600], 2, 128, 128, 4),
    ([580], 2, 64, 64, 16),
    ([129, 1, 0, 257, 64], 4, 128, 64, 3),
    ([0, 3, 0, 0, 200, 1], 3, 64, 64, 2),
    ([63, 0, 130, 5], 1, 64, 128, 1),
    ([65] + [1] * 20 + [191], 2, 64, 64, 64),
    ([640], 1, 64, 64, 5),
]
WITH_TIES = [CASES[1], pytest.param(*CASES[2], marks=slow_in_interpreter), *CASES[3:5]]
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=slow_in_interpreter)]
cases = pytest.mark.parametrize(("lengths", "groups", "dim", "block_size", "count"), CASES)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@cases
def test_scores_with_ties_give_exactly_the_blocks_of_the_reference(
    lengths, groups, dim, block_size, count, dtype
):
    index_q, index_k = integer_inputs(sum(lengths), groups, dim, dtype)
    layout = layout_of(lengths)
    found, expected = both(index_q, index_k, layout, block_size, count)
    assert_form(found.block_ids, layout, block_size, count)
    assert_same_blocks(found, expected)
    assert_lse_is_right(found, index_q, index_k, layout, block_size)


@needs_triton
@cases
def test_random_scores_give_the_blocks_of_the_reference(lengths, groups, dim, block_size, count):
    index_q, index_k = random_index(sum(lengths), groups, dim)
    layout = layout_of(lengths)
    found, expected = both(index_q, index_k, layout, block_size, count)
    assert_form(found.block_ids, layout, block_size, count)
    assert_differs_only_in_near_ties(found, expected, index_q, index_k, layout, block_size)
    assert_lse_is_right(found, index_q, index_k, layout, block_size)


@needs_triton
@pytest.mark.parametrize("score_dtype", ["input", "e4m3"])
@pytest.mark.parametrize(("lengths", "groups", "dim", "block_size", "count"), WITH_TIES)
def test_without_the_lse_ties_give_exactly_the_blocks_of_the_reference(
    lengths, groups, dim, block_size, count, score_dtype
):
    # e4m3 holds these small integers exactly.
    index_q, index_k = integer_inputs(sum(lengths), groups, dim)
    layout = layout_of(lengths)
    options = {"with_lse": False, "score_dtype": score_dtype}
    found, expected = both(index_q, index_k, layout, block_size, count, **options)
    assert found.index_lse is None
    assert_form(found.block_ids, layout, block_size, count)
    assert_same_blocks(found, expected)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "groups", "dim", "block_size", "count"), [CASES[1], CASES[3]])
def test_e4m3_gives_the_blocks_of_the_reference(lengths, groups, dim, block_size, count, dtype):
    index_q, index_k = random_index(sum(lengths), groups, dim, dtype)
    index_k *= torch.logspace(-2, 0, sum(lengths), device=DEVICE)[:, None].to(dtype)  # a scale per token
    layout = layout_of(lengths)
    options = {"with_lse": False, "score_dtype": "e4m3"}
    found, expected = both(index_q, index_k, layout, block_size, count, **options)
    assert_form(found.block_ids, layout, block_size, count)
    # Hopper adds the products of 8-bit numbers with 13 bits behind the point of the largest: 2^-13 of a
    # product of up to 448^2 against 1 for the whole score, 32 products at a time.
    limits = {"closer_than": 4e-3, "share": 0.05} if DEVICE == "cuda" else {}
    vectors = rounded(index_q), rounded(index_k)
    assert_differs_only_in_near_ties(found, expected, *vectors, layout, block_size, **limits)


@needs_triton
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_e4m3_ranks_tokens_that_are_not_finite_last(value):
    layout = layout_of([300, 77])
    index_q, index_k = integer_inputs(377, 2, 64)
    index_k[64:128, 5] = value  # all of block 1
    index_k[200, 3] = value
    found, expected = both(index_q, index_k, layout, 64, 3, with_lse=False, score_dtype="e4m3")
    assert_form(found.block_ids, layout, 64, 3)
    assert_same_blocks(found, expected)


@needs_triton
def test_any_subset_of_queries_in_any_order_gets_the_rows_of_the_full_call():
    # Neighbouring rows of the subset come from different documents and lie far apart.
    lengths = [129, 1, 0, 257, 64, 0]
    layout = layout_of(lengths)
    index_q, index_k = integer_inputs(sum(lengths), 3, 64)
    full = block_select(index_q, index_k, layout, block_size=64, num_selected_blocks=3, backend="triton")
    rows = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(1))[:97].to(DEVICE)
    part, expected = both(index_q[rows], index_k, layout.select_queries(rows), 64, 3)
    assert torch.equal(part.block_ids, full.block_ids[rows])
    assert torch.equal(part.index_lse, full.index_lse[rows])
    assert_same_blocks(part, expected)


@needs_triton
def test_nan_scores_rank_last_and_reach_only_the_lse_of_rows_that_chose_them():
    layout = layout_of([330, 77])
    index_q, index_k = integer_inputs(407, 2, 64)
    index_k[64:128] = math.nan  # block 1: every score is NaN
    index_k[200] = math.nan  # block 3: one token
    index_q[300] = math.nan
    index_q[320, 1] = math.nan
    for count in (2, 4, 16):
        found, expected = both(index_q, index_k, layout, 64, count)
        assert_form(found.block_ids, layout, 64, count)
        assert_same_blocks(found, expected)
        torch.testing.assert_close(found.index_lse, expected.index_lse, equal_nan=True, rtol=1e-6, atol=1e-6)


@needs_triton
def test_infinite_scores_are_ordinary_numbers():
    layout = layout_of([300])
    index_q, index_k = integer_inputs(300, 2, 64)
    index_q, index_k = index_q.abs() + 1, index_k.abs()
    index_k[70, 0] = math.inf
    index_k[64 * 3 : 64 * 4, 0] = -math.inf
    for count in (2, 3, 5):
        found, expected = both(index_q, index_k, layout, 64, count)
        assert_same_blocks(found, expected)
        torch.testing.assert_close(found.index_lse, expected.index_lse, rtol=1e-6, atol=1e-6)


def topk(block_max, position, count):
    """Block ids of the top-k kernel alone, for rows of one group and blocks of 64 tokens: [rows, count]."""
    import triton
    from msa_kernels.block_select.triton_run import TOPK_ROWS, TOPK_SETTINGS, topk_queue
    from msa_kernels.block_select.triton_topk import topk_kernel

    rows = block_max.shape[1]
    block_ids = torch.zeros(rows, count, dtype=torch.int32, device=DEVICE)
    sizes = {"GROUPS": 1, "BLOCK": 64, "COUNT": count, "SLOTS": triton.next_power_of_2(count)}
    queue = topk_queue(rows, block_max.device)
    topk_kernel[(triton.cdiv(rows, TOPK_ROWS),)](
        block_max, None, position, queue, block_ids, None, 0, rows, rows, **sizes, **TOPK_SETTINGS
    )
    return block_ids


@needs_triton
def test_negative_and_positive_zero_tie():
    block_max = torch.tensor([-0.0, 0.0, -1.0, 0.0], device=DEVICE)[:, None]
    position = torch.tensor([4 * 64], dtype=torch.int32, device=DEVICE)
    assert sorted(topk(block_max, position, 3)[0].tolist()) == [0, 1, 4]


@needs_triton
@pytest.mark.parametrize("count", [1, 7, 16])
def test_scores_in_any_order_give_the_best_blocks(count):
    # Rising scores all enter, one after the other; of falling ones none does after the first.
    rows, blocks = 40, 45
    generator = torch.Generator().manual_seed(0)
    rank = torch.arange(blocks).float()[:, None].repeat(1, rows)
    block_max = torch.randint(-20, 20, (blocks, rows), generator=generator).float()
    block_max[:, 0::8] = rank[:, 0::8]
    block_max[:, 1::8] = -rank[:, 1::8]
    block_max[:, 2::8] = 5.0
    block_max[:, 3::8] = -math.inf
    block_max[20:, 4::8] += 100
    local = torch.randint(0, blocks, (rows,), generator=generator)
    position = (local * 64 + 7).int().to(DEVICE)
    found = topk(block_max.to(DEVICE), position, count)
    for row in range(rows):
        scores = block_max[: local[row], row].tolist()
        best = sorted(range(len(scores)), key=lambda block, scores=scores: (-scores[block], block))
        wanted = [*sorted(best[: count - 1]), int(local[row])]
        ids = found[row].tolist()
        assert sorted(ids[: len(wanted)]) == wanted, row
        assert ids[len(wanted) - 1] == local[row]
        assert ids[len(wanted) :] == [-1] * (count - len(wanted))


@needs_triton
def test_chunks_of_queries_and_segments_of_blocks_change_nothing(monkeypatch):
    from msa_kernels.block_select import triton_run

    lengths = [130, 0, 400]
    layout = layout_of(lengths)
    index_q, index_k = random_index(530, 3, 64)
    options = {"block_size": 64, "num_selected_blocks": 3, "backend": "triton"}
    whole = block_select(index_q, index_k, layout, **options)
    monkeypatch.setattr(triton_run, "MAX_BUFFER_BYTES", 1)
    monkeypatch.setattr(triton_run, "MIN_SEGMENT_BLOCKS", 1)
    monkeypatch.setattr(triton_run, "MAX_SEGMENT_BLOCKS", 2)
    cut = block_select(index_q, index_k, layout, **options)
    assert torch.equal(cut.block_ids, whole.block_ids)
    assert torch.equal(cut.index_lse, whole.index_lse)


@needs_triton
def test_a_loose_bound_of_the_document_length_and_the_layout_in_memory_change_nothing():
    index_q, index_k = integer_inputs(200, 2, 64)
    layout = layout_of([70, 130])
    options = {"block_size": 64, "num_selected_blocks": 2, "backend": "triton"}
    plain = block_select(index_q, index_k, layout, **options)
    loose = DocumentLayout(
        document_offsets=layout.document_offsets,
        query_document=layout.query_document,
        query_position=layout.query_position,
        max_document_length=5000,
    )
    strided_q = torch.stack([index_q, index_q + 1], dim=-1)[..., 0]
    misaligned_k = torch.cat([index_k.new_zeros(1), index_k.flatten()])[1:].view(200, 1, 64)
    other = block_select(strided_q, misaligned_k, loose, **options)
    assert torch.equal(plain.block_ids, other.block_ids)
    assert torch.equal(plain.index_lse, other.index_lse)


@needs_triton
def test_the_scale_changes_the_lse_and_not_the_selection():
    index_q, index_k = random_index(300, 2, 64)
    layout = layout_of([300])
    plain, _ = both(index_q, index_k, layout, 64, 3)
    scaled, expected = both(index_q, index_k, layout, 64, 3, softmax_scale=3.0)
    assert torch.equal(plain.block_ids, scaled.block_ids)
    torch.testing.assert_close(scaled.index_lse, expected.index_lse, rtol=2e-6, atol=2e-6)


@needs_triton
def test_no_queries_select_nothing_and_no_gradient_flows():
    index_q, index_k = random_index(5, 2, 64)
    layout = layout_of([5])
    options = {"block_size": 64, "num_selected_blocks": 3, "backend": "triton"}
    block_ids, index_lse = block_select(index_q[:0], index_k, layout.select_queries(slice(0, 0)), **options)
    assert block_ids.shape == (0, 2, 3)
    assert index_lse.shape == (0, 2)
    selection = block_select(index_q.requires_grad_(), index_k.requires_grad_(), layout, **options)
    assert not selection.index_lse.requires_grad


@needs_triton
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"dtype": torch.float32},
            "index_q has dtype torch.float32; it takes torch.bfloat16",
        ),
        ({"dim": 32}, "the index head dim is 32; it takes 64 and 128"),
        ({"block_size": 32}, "block_size is 32; it takes 64 and 128"),
        ({"count": 65}, "num_selected_blocks is 65; it takes at most 64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_the_reference(changes, reason):
    wanted = {"dtype": torch.bfloat16, "dim": 64, "block_size": 64, "count": 2} | changes
    index_q, index_k = random_index(70, 1, wanted["dim"], wanted["dtype"])
    options = {"block_size": wanted["block_size"], "num_selected_blocks": wanted["count"]}
    with pytest.raises(RuntimeError, match=f"block_select cannot run with backend='triton': {reason}"):
        block_select(index_q, index_k, layout_of([70]), backend="triton", **options)
    auto = block_select(index_q, index_k, layout_of([70]), **options)
    reference = block_select(index_q, index_k, layout_of([70]), backend="reference", **options)
    assert torch.equal(auto.block_ids, reference.block_ids)


@needs_triton
def test_auto_takes_the_kernels_where_they_can_run(monkeypatch):
    from msa_kernels.block_select import triton_run

    ran = []
    kernel = triton_run.topk_kernel
    monkeypatch.setattr(
        triton_run, "topk_kernel", {(1,): lambda *args, **options: ran.append(kernel[(1,)](*args, **options))}
    )
    index_q, index_k = random_index(5, 1, 64)
    block_select(index_q, index_k, layout_of([5]), block_size=64, num_selected_blocks=2)
    assert len(ran) == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "groups", "dim", "block_size", "count"),
    [
        ([9000], 4, 128, 128, 16),
        ([9000], 4, 128, 64, 64),
        ([9000], 8, 64, 128, 7),
        ([3000, 1, 0, 4097, 31, 2222, 0], 4, 128, 128, 16),
        ([1] * 300 + [37] * 40 + [5000], 3, 64, 64, 16),
    ],
)
def test_larger_sizes_on_a_gpu(lengths, groups, dim, block_size, count, dtype):
    layout = layout_of(lengths)
    index_q, index_k = integer_inputs(sum(lengths), groups, dim, dtype)
    found, expected = both(index_q, index_k, layout, block_size, count)
    assert_form(found.block_ids, layout, block_size, count)
    assert_same_blocks(found, expected)

    index_q, index_k = random_index(sum(lengths), groups, dim, dtype)
    found, expected = both(index_q, index_k, layout, block_size, count)
    assert_form(found.block_ids, layout, block_size, count)
    assert_differs_only_in_near_ties(found, expected, index_q, index_k, layout, block_size)
    rows = torch.randperm(sum(lengths), device=DEVICE)[:2000]
    part = block_select(
        index_q[rows],
        index_k,
        layout.select_queries(rows),
        block_size=block_size,
        num_selected_blocks=count,
        backend="triton",
    )
    assert torch.equal(part.block_ids.sort(-1).values, found.block_ids[rows].sort(-1).values)
    assert torch.equal(part.index_lse, found.index_lse[rows])
    assert_lse_is_right(part, index_q[rows], index_k, layout.select_queries(rows), block_size)

    without = block_select(
        index_q,
        index_k,
        layout,
        block_size=block_size,
        num_selected_blocks=count,
        with_lse=False,
        backend="triton",
    )
    assert torch.equal(without.block_ids.sort(-1).values, found.block_ids.sort(-1).values)
    options = {"with_lse": False, "score_dtype": "e4m3"}
    found, expected = both(index_q, index_k, layout, block_size, count, **options)
    assert_form(found.block_ids, layout, block_size, count)
    limits = {"closer_than": 4e-3, "share": 0.1}
    vectors = rounded(index_q), rounded(index_k)
    assert_differs_only_in_near_ties(found, expected, *vectors, layout, block_size, **limits)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"with_lse": False}, {"with_lse": False, "score_dtype": "e4m3"}],
    ids=["with lse", "maxima only", "e4m3"],
)
def test_neither_a_synchronisation_nor_a_new_compilation_for_other_lengths_and_documents(options):
    from msa_kernels.block_select.triton_scores import block_scores_kernel
    from msa_kernels.block_select.triton_topk import topk_kernel

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in (block_scores_kernel, topk_kernel)]

    def select(lengths, queries):
        index_q, index_k = random_index(sum(lengths), 2, 64)
        layout = layout_of(lengths).select_queries(queries)
        index_q = index_q[queries]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            sizes = {"block_size": 64, "num_selected_blocks": 3}
            block_select(index_q, index_k, layout, backend="triton", **sizes, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    select([1024], slice(None))
    before = compiled()
    select([1], slice(None))
    select([1000, 1, 0, 3], slice(1, None))
    select([5001, 77], torch.arange(5000, 3, -7, device=DEVICE))
    assert compiled() == before
