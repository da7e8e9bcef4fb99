"""The Triton kernels of decoding against the reference.

Where they run: see `triton_interpreter`. The interpreter is slow, so that it gets the smallest sizes that
have every edge; the tests marked `gpu` take larger ones.
"""

import math

import pytest
import torch
from decode_inputs import decoding, in_8_bits
from msa_kernels import decode_attention, decode_select
from triton_interpreter import DEVICE, needs_triton

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


pytestmark = pytest.mark.usefixtures("poisoned_buffers")

# Page boundaries, unused places, one token, fewer tokens than queries, more slots than blocks. Lengths, and
# then new tokens, heads, groups, dim of heads and of index heads, block size, slots.
SMALL = [
    ([0, 1, 129, 256], 1, 16, 1, 64, 64, 128, 2),
    ([193, 3, 128], 3, 6, 2, 64, 128, 64, 3),
    ([64, 450], 2, 2, 2, 128, 64, 64, 4),
    ([65], 16, 3, 1, 64, 64, 64, 3),
]
LARGE = [
    ([5000, 0, 1, 128, 129, 20000], 1, 64, 4, 128, 128, 128, 16),
    ([5000, 2, 3000], 4, 64, 4, 128, 128, 128, 16),
    ([2049, 16, 15], 16, 64, 4, 128, 128, 64, 5),
    ([777, 4096], 5, 13, 1, 128, 64, 128, 64),
    ([12345], 2, 24, 8, 64, 128, 64, 1),
    ([640, 639, 641], 16, 16, 16, 64, 64, 64, 7),
]
CASES = [*SMALL, *(pytest.param(*case, marks=[pytest.mark.gpu, needs_gpu]) for case in LARGE)]
NAMES = ("lengths", "q_len", "heads", "groups", "dim", "index_dim", "block_size", "slots")
cases = pytest.mark.parametrize(NAMES, CASES)
DTYPES = [torch.bfloat16, torch.float16]


def made(lengths, q_len, heads, groups, dim, index_dim, block_size, dtype=torch.bfloat16, **options):
    return decoding(
        lengths,
        q_len=q_len,
        heads=heads,
        groups=groups,
        dim=dim,
        index_dim=index_dim,
        block_size=block_size,
        dtype=dtype,
        device=DEVICE,
        **options,
    )


def both_selections(inputs, slots, **options):
    return [
        decode_select(*inputs, top_k=slots, backend=backend, **options) for backend in ("triton", "reference")
    ]


def assert_form(block_ids, inputs, block_size):
    """Distinct blocks before the local one, the local block last among the valid entries, -1 behind it."""
    q_len, slots = block_ids.shape[1], block_ids.shape[3]
    position = inputs.lengths[:, None] - q_len + torch.arange(q_len, device=block_ids.device)
    local = torch.where(position < 0, -1, position // block_size)[:, :, None, None]
    slot = torch.arange(slots, device=block_ids.device)
    num_others = torch.where(local < 0, -1, local.clamp(max=slots - 1))
    is_other = (slot < num_others).expand_as(block_ids)
    assert ((block_ids >= 0) & (block_ids < local))[is_other].all()
    assert (block_ids == local)[(slot == num_others).expand_as(block_ids)].all()
    assert (block_ids == -1)[(slot > num_others).expand_as(block_ids)].all()
    ordered = block_ids.sort(dim=-1).values
    assert ((ordered[..., 1:] > ordered[..., :-1]) | (ordered[..., :-1] == -1)).all()


def sorted_ids(block_ids):
    return block_ids.sort(dim=-1).values


def assert_selects_like_the_reference(found, expected, inputs, block_size, *, keys=None):
    """Equal sets of blocks, but where scores lie within 1e-5: fp32 sums of products of the order of 1 differ
    by a few 1e-7 with their order. In at most 1 % of the rows (or one row of few)."""
    assert_form(found, inputs, block_size)
    differs = (sorted_ids(found) != sorted_ids(expected)).any(dim=-1)
    assert int(differs.sum()) <= max(1, differs.numel() // 100)
    keys = inputs.index_keys if keys is None else keys
    for sequence, query, group in differs.nonzero().tolist():
        in_question = set(found[sequence, query, group].tolist()) ^ set(
            expected[sequence, query, group].tolist()
        )
        vector = inputs.index_query[sequence, query, group].double()
        scores = [
            float((keys[sequence][block * block_size : (block + 1) * block_size].double() @ vector).max())
            for block in in_question
        ]
        assert max(scores) - min(scores) <= 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@cases
def test_scores_with_ties_give_exactly_the_blocks_of_the_reference(
    lengths, q_len, heads, groups, dim, index_dim, block_size, slots, dtype
):
    inputs = made(lengths, q_len, heads, groups, dim, index_dim, block_size, dtype, ties=True)
    found, expected = both_selections(inputs.select, slots)
    assert_form(found, inputs, block_size)
    assert torch.equal(sorted_ids(found), sorted_ids(expected))


@needs_triton
@cases
def test_random_scores_give_the_blocks_of_the_reference(
    lengths, q_len, heads, groups, dim, index_dim, block_size, slots
):
    inputs = made(lengths, q_len, heads, groups, dim, index_dim, block_size)
    found, expected = both_selections(inputs.select, slots)
    assert_selects_like_the_reference(found, expected, inputs, block_size)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(NAMES, CASES[1:3] + CASES[4:6])
def test_8_bit_index_keys_give_the_blocks_of_the_reference(
    lengths, q_len, heads, groups, dim, index_dim, block_size, slots, dtype
):
    inputs = made(lengths, q_len, heads, groups, dim, index_dim, block_size, dtype)
    cache, scale = in_8_bits(inputs.index_key_cache)
    select = (inputs.index_query, cache, *inputs.select[2:])
    found, expected = both_selections(select, slots, index_key_scale=scale)
    wide = cache.double() * scale.double()[..., None]
    keys = [
        wide[inputs.page_table[sequence, : -(-length // block_size)].long()].flatten(0, 1)[:length]
        for sequence, length in enumerate(lengths)
    ]
    assert_selects_like_the_reference(found, expected, inputs, block_size, keys=keys)


@needs_triton
@pytest.mark.parametrize("factor", [1.0, 2.0**60, 2.0**-60])
def test_8_bit_scores_of_queries_of_any_size_rank_alike(factor):
    inputs = made([450], 1, 2, 2, 64, 64, 64)
    cache, scale = in_8_bits(inputs.index_key_cache)
    expected = decode_select(
        inputs.index_query, cache, *inputs.select[2:], top_k=4, index_key_scale=scale, backend="reference"
    )
    found = decode_select(
        inputs.index_query * factor,
        cache,
        *inputs.select[2:],
        top_k=4,
        index_key_scale=scale,
        backend="triton",
    )
    assert torch.equal(sorted_ids(found), sorted_ids(expected))


@needs_triton
def test_scores_that_are_not_finite_and_zeros_of_either_sign():
    inputs = made([64 * 8 + 5], 2, 2, 2, 64, 64, 64, ties=True)
    pages = inputs.page_table[0].long()
    cache = inputs.index_key_cache
    cache[pages[1], 3] = math.nan
    cache[pages[2]] = math.nan
    cache[pages[4]] = -0.0
    cache[pages[5]] = 0.0
    cache[pages[6], 7, 0] = math.inf
    inputs.index_query[..., 0] = 1
    for slots in (1, 2, 4, 8, 16):
        found, expected = both_selections(inputs.select, slots)
        assert_form(found, inputs, 64)
        assert torch.equal(sorted_ids(found), sorted_ids(expected))


def top_k(block_max, slots, hands=128, loads=4096):
    """Block ids of the top-k kernel alone: block_max [rows, blocks] and one sequence per row."""
    import triton
    from msa_kernels.decode.triton_topk import decode_topk_kernel

    rows, blocks = block_max.shape
    lengths = torch.full((rows,), 64 * blocks - 63, dtype=torch.int32, device=DEVICE)
    block_ids = torch.zeros(rows, slots, dtype=torch.int32, device=DEVICE)
    padded = triton.next_power_of_2(slots)
    parts = max(4, hands // padded)
    sizes = {"SLOTS": padded, "PARTS": parts, "CHUNK": loads // (padded * parts)}
    decode_topk_kernel[(rows,)](
        block_max.contiguous(),
        lengths,
        block_ids,
        blocks,
        QUERIES=1,
        GROUPS=1,
        BLOCK=64,
        COUNT=slots,
        **sizes,
    )
    return block_ids


@needs_triton
@pytest.mark.parametrize(
    ("blocks", "slots", "sizes"),
    [
        (1, 4, {}),
        (130, 1, {}),
        (129, 16, {}),
        (2000, 15, {}),
        (700, 64, {}),
        (400, 4, {"hands": 16, "loads": 32}),
        pytest.param(70_001, 16, {}, marks=[pytest.mark.gpu, needs_gpu]),
    ],
)
def test_scores_in_any_order_give_the_best_blocks(blocks, slots, sizes):
    generator = torch.Generator().manual_seed(0)
    rank = torch.arange(blocks).float()
    block_max = torch.stack(
        [
            rank,
            -rank,
            torch.full((blocks,), 5.0),
            torch.full((blocks,), -math.inf),
            torch.randint(-20, 20, (blocks,), generator=generator).float(),
            torch.randn(blocks, generator=generator),
            # The best ones all in one hand of the first round.
            torch.where(rank % 128 == 7, rank, -rank),
        ]
    )
    found = top_k(block_max.to(DEVICE), slots, **sizes).tolist()
    local = blocks - 1
    for row, ids in enumerate(found):
        scores = block_max[row, :local].tolist()
        best = sorted(range(local), key=lambda block, scores=scores: (-scores[block], block))[: slots - 1]
        assert ids == [*best, local, *[-1] * (slots - 1 - len(best))], row


def exact_attention(inputs, block_ids, **caches):
    """The reference in fp64."""
    query, keys, values = (each.double() for each in inputs.attend[:3])
    for name, (cache, scale) in caches.items():
        wide = cache.double() * scale.double()[..., None]
        keys, values = (wide, values) if name == "key" else (keys, wide)
    return decode_attention(query, keys, values, *inputs.attend[3:], block_ids, backend="reference")


def assert_attention_is_right(found, exact, dtype):
    """Probabilities and results are rounded to 16 bits: relative errors of two to three roundings (2^-9 of
    bf16, 2^-12 of fp16) in the norm of a row. Queries that see nothing have exactly 0."""
    assert found.dtype == dtype
    norm = exact.norm(dim=-1)
    error = (found.double() - exact).norm(dim=-1)
    assert (error[norm == 0] == 0).all()
    assert (error <= (6e-3 if dtype == torch.bfloat16 else 1e-3) * norm).all()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
@cases
def test_attention_is_that_of_the_reference(
    lengths, q_len, heads, groups, dim, index_dim, block_size, slots, dense, dtype
):
    if dtype == torch.float16 and DEVICE != "cuda" and len(lengths) != 2:
        pytest.skip("one case shows fp16 in the interpreter")
    inputs = made(lengths, q_len, heads, groups, dim, index_dim, block_size, dtype)
    block_ids = None if dense else decode_select(*inputs.select, top_k=slots, backend="reference")
    found = decode_attention(*inputs.attend, block_ids, backend="triton")
    assert_attention_is_right(found, exact_attention(inputs, block_ids), dtype)


@needs_triton
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("eight", [("key", "value"), ("value",), ("key",)], ids="-".join)
@pytest.mark.parametrize(NAMES, [CASES[2], CASES[5]])
def test_attention_over_8_bit_caches(
    lengths, q_len, heads, groups, dim, index_dim, block_size, slots, eight, dense
):
    inputs = made(lengths, q_len, heads, groups, dim, index_dim, block_size)
    block_ids = None if dense else decode_select(*inputs.select, top_k=slots, backend="reference")
    caches = {"key": inputs.key_cache, "value": inputs.value_cache}
    in_8 = {name: in_8_bits(caches[name]) for name in eight}
    scales = {f"{name}_scale": scale for name, (_, scale) in in_8.items()}
    caches |= {name: cache for name, (cache, _) in in_8.items()}
    found = decode_attention(
        inputs.query,
        caches["key"],
        caches["value"],
        *inputs.attend[3:],
        block_ids,
        **scales,
        backend="triton",
    )
    assert_attention_is_right(found, exact_attention(inputs, block_ids, **in_8), torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("dense", [False, True])
def test_other_launches_change_nothing_but_roundings(dense):
    from msa_kernels.decode import triton_attention, triton_select

    inputs = made([321, 70], 3, 4, 2, 64, 64, 64)
    launch = triton_select.SelectLaunch(programs=4, max_segment=2, hands=64, loads=64)
    options = {"top_k": 4, "index_key_scale": None}
    block_ids = triton_select.run(*inputs.select, **options, launch=launch)
    assert torch.equal(block_ids, triton_select.run(*inputs.select, **options))
    chosen = None if dense else block_ids
    exact = exact_attention(inputs, chosen)
    options = {"scale": 0.125, "key_scale": None, "value_scale": None}
    for programs, part, keys, chunk in ((1, 100, 64, 16), (64, 2, 32, 2)):
        launch = triton_attention.AttendLaunch(
            programs=programs, max_part=part, stages=2, keys=keys, chunk=chunk
        )
        found = triton_attention.run(*inputs.attend, chosen, **options, launch=launch)
        assert_attention_is_right(found, exact, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize(("dense", "stages"), [(False, 1), (False, 3), (True, 1), (True, 5)])
def test_stages_that_compile_to_a_wrong_kernel_or_to_none_are_refused(dense, stages):
    from msa_kernels.decode import triton_attention

    inputs = made([70], 1, 2, 1, 64, 64, 64)
    block_ids = None if dense else torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=DEVICE)
    launch = triton_attention.AttendLaunch(programs=1, max_part=1, stages=stages)
    options = {"scale": 0.125, "key_scale": None, "value_scale": None, "launch": launch}
    with pytest.raises(ValueError, match=f"launch.stages is {stages}; over .* blocks it must be"):
        triton_attention.run(*inputs.attend, block_ids, **options)


@needs_triton
@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({"index_dim": 32}, 4, "the index head dim is 32; supported are"),
        ({"block_size": 32}, 4, "the block size is 32; supported are"),
        ({"dtype": torch.float32}, 4, "index_query has dtype torch.float32; supported are"),
        ({}, 65, "top_k is 65; at most 64"),
    ],
)
def test_what_the_selection_refuses(changes, slots, message):
    sizes = {"index_dim": 64, "block_size": 64, "dtype": torch.bfloat16, "device": DEVICE} | changes
    inputs = decoding([70], **sizes)
    with pytest.raises(RuntimeError, match=message):
        decode_select(*inputs.select, top_k=slots, backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "the head dim is 32; supported are"),
        ({"heads": 34}, "there are 17 query heads per group; at most 16"),
        ({"block_size": 32}, "the block size is 32; supported are"),
        ({"dtype": torch.float32}, "query has dtype torch.float32; supported are"),
    ],
)
def test_what_the_attention_refuses(changes, message):
    sizes = {"dim": 64, "block_size": 64, "dtype": torch.bfloat16, "device": DEVICE} | changes
    inputs = decoding([70], **sizes)
    with pytest.raises(RuntimeError, match=message):
        decode_attention(*inputs.attend, None, backend="triton")


STANDARD = {"heads": 64, "groups": 4, "dim": 128, "index_dim": 128, "block_size": 128}


def step(inputs, dense=False):
    if dense:
        return [decode_attention(*inputs.attend, None, backend="triton")]
    block_ids = decode_select(*inputs.select, top_k=16, backend="triton")
    return [block_ids, decode_attention(*inputs.attend, block_ids, backend="triton")]


def fill(inputs, other):
    """Other queries, caches, pages and lengths in the same memory."""
    for place, tensor in zip(
        (*inputs.attend, *inputs.select[:2]), (*other.attend, *other.select[:2]), strict=True
    ):
        place.copy_(tensor)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dense", [False, True])
def test_a_cuda_graph_replays_with_other_lengths_pages_and_tokens(dense):
    total = 60  # tokens of all sequences fill as many pages each time
    options = {**STANDARD, "dtype": torch.bfloat16, "device": DEVICE, "max_blocks": total, "q_len": 2}
    inputs = decoding([128 * 20, 128 * 40, 0], **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, dense)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step(inputs, dense)
    for seed, lengths in enumerate([[128 * 59 - 3, 1, 0], [128 * 30, 128 * 29 + 1, 0], [2, 128 * 58, 7]], 1):
        other = decoding(lengths, **options, seed=seed)
        fill(inputs, other)
        graph.replay()
        torch.testing.assert_close(written, step(other, dense), rtol=0, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_neither_a_synchronisation_nor_a_new_compilation_for_other_lengths():
    from msa_kernels.decode.triton_attend import decode_attend_kernel, decode_combine_kernel
    from msa_kernels.decode.triton_scores import decode_scores_kernel
    from msa_kernels.decode.triton_topk import decode_topk_kernel

    kernels = (decode_scores_kernel, decode_topk_kernel, decode_attend_kernel, decode_combine_kernel)

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    def decode(lengths, seed):
        inputs = decoding(lengths, **STANDARD, dtype=torch.bfloat16, device=DEVICE, max_blocks=50, seed=seed)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(inputs)
            step(inputs, dense=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    decode([4000, 128, 1], 0)
    before = compiled()
    decode([0, 0, 0], 1)
    decode([6400, 6399, 3], 2)
    assert compiled() == before
