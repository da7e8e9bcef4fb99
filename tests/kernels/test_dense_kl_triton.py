"""The kernels of dense_kl against the reference.

Where they run: see `triton_interpreter`. The interpreter multiplies bf16 matrices wrongly; it gets fp16. It
never sees the library kernels, which exist on a GPU only.
"""

import dataclasses

import pytest
import torch
from attention_checks import (
    DTYPES,
    UNSUPPORTED,
    assert_error_at_most_twice,
    assert_out_and_kl_reach_inputs_of_their_own,
    five_tokens,
    make_inputs,
    on_device,
    outputs_and_gradients,
    straightforward,
)
from kernel_oracles import Inputs, packed_layout
from msa_kernels import DocumentLayout, dense_kl
from triton_interpreter import DEVICE, needs_triton

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


def run(leaves, layout, kl_teacher="group_mean"):
    return dense_kl(
        *leaves[:3],
        layout,
        index_q=leaves.index_q,
        index_k=leaves.index_k,
        kl_teacher=kl_teacher,
        backend="triton",
    )


def check(layout, num_keys, *, groups, group, dim, index_dim, kl_teacher, dtype):
    layout = on_device(layout)
    inputs = make_inputs(
        layout, num_keys, groups=groups, group=group, dim=dim, index_dim=index_dim, dtype=dtype
    )
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(inputs.q.shape, generator=generator).to(DEVICE, dtype)
    kl_weights = torch.randn(inputs.q.shape[0], groups, generator=generator).to(DEVICE)
    # All tokens of a document as one block, which everyone chose.
    block_size = max(1, layout.max_document_length)
    everything = torch.zeros(layout.num_queries, groups, 1, dtype=torch.int32, device=DEVICE)

    def plain(leaves, cast):
        leaves = Inputs(*(tensor.to(cast) for tensor in leaves))
        return straightforward(leaves, everything, layout, block_size, kl_teacher, cast)

    exact_inputs = Inputs(*(tensor.double() for tensor in inputs))
    exact = outputs_and_gradients(lambda x: plain(x, torch.float64), exact_inputs, weights, kl_weights)
    same_dtype = outputs_and_gradients(lambda x: plain(x, dtype), inputs, weights, kl_weights)
    found = outputs_and_gradients(lambda x: run(x, layout, kl_teacher), inputs, weights, kl_weights)
    assert_error_at_most_twice(found, same_dtype, exact, 64)


SHAPES = [
    # lengths, groups, heads per group, dim, index dim, KL
    ([100, 1, 0, 75], 2, 4, 64, 64, "group_mean"),
    ([100, 1, 0, 75], 2, 3, 64, 64, "per_head"),
    ([1, 0, 140], 1, 16, 128, 64, "group_mean"),
    ([270], 1, 1, 64, 128, "per_head"),
    ([0, 140, 1, 1, 1, 150], 1, 2, 64, 64, "group_mean"),
]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_as_exact_as_pytorch_in_the_same_dtype(shape, dtype):
    lengths, groups, group, dim, index_dim, kl_teacher = shape
    check(
        packed_layout(lengths), sum(lengths), groups=groups, group=group, dim=dim, index_dim=index_dim,
        kl_teacher=kl_teacher, dtype=dtype,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_may_be_any_subset_of_the_keys_places_in_any_order(dtype):
    layout = packed_layout([70, 0, 300, 3, 110])
    chosen = torch.randperm(483, generator=torch.Generator().manual_seed(1))[:150]
    # No query of the second document but its last: its tiles of keys are stepped over.
    chosen = chosen[(chosen < 70) | (chosen > 360)]
    check(
        layout.select_queries(chosen), 483, groups=2, group=2, dim=64, index_dim=64, kl_teacher="group_mean",
        dtype=dtype,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "first"), [([290, 20], 50), ([40, 250, 30], 0)], ids=str)
def test_several_segments_of_the_keys_and_several_chunks_of_queries(lengths, first, dtype, monkeypatch):
    from msa_kernels.dense_kl import triton_kl, triton_kl_gradient

    monkeypatch.setattr(triton_kl, "MIN_SEGMENT_KEYS", 128)
    monkeypatch.setattr(triton_kl_gradient, "SCORE_SEGMENT_KEYS", 128)
    monkeypatch.setattr(triton_kl_gradient, "QUERY_SEGMENT_KEYS", 128)
    monkeypatch.setattr(triton_kl_gradient, "MAX_BUFFER_BYTES", 1)
    # Without the first 50 queries the tiles of places and those of keys are not in step.
    check(
        packed_layout(lengths).select_queries(slice(first, None)), sum(lengths), groups=2, group=2, dim=64,
        index_dim=64, kl_teacher="group_mean", dtype=dtype,
    )  # fmt: skip


def small_call():
    layout = on_device(packed_layout([80, 10]))
    return layout, make_inputs(layout, 90, groups=1, group=2, dim=64, index_dim=64, dtype=torch.float16)


@needs_triton
def test_without_the_index_branch_there_is_no_kl_and_the_rest_is_the_same():
    layout, inputs = small_call()
    both = []
    for index in ({}, {"index_q": inputs.index_q, "index_k": inputs.index_k}):
        leaves = inputs.clones()
        found = dense_kl(*leaves[:3], layout, backend="triton", **index)
        gradients = torch.autograd.grad(found.out.sum(), leaves[:3])
        both.append((found.out, found.lse, *gradients))
        assert (found.kl is None) == (not index)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@needs_triton
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (0, 4), ()], ids=str)
def test_only_the_inputs_that_want_a_gradient_get_one_and_it_is_the_same(wanted):
    layout, inputs = small_call()

    def gradients(chosen):
        leaves = inputs.clones(requires_grad=False)
        for place in chosen:
            leaves[place].requires_grad_()
        found = run(leaves, layout)
        assert found.out.requires_grad == any(place < 3 for place in chosen)
        assert found.kl.requires_grad == any(place > 2 for place in chosen)
        if chosen:
            (found.out.float().sum() + found.kl.sum()).backward()
        return [leaf.grad for leaf in leaves]

    every, some = gradients(range(5)), gradients(wanted)
    for place in range(5):
        if place in wanted:
            torch.testing.assert_close(some[place], every[place], rtol=0, atol=0)
        else:
            assert some[place] is None


@needs_triton
def test_out_reaches_no_index_input_and_kl_reaches_nothing_else():
    layout, inputs = small_call()
    leaves = inputs.clones()
    found = run(leaves, layout)
    assert_out_and_kl_reach_inputs_of_their_own(found, leaves)


@needs_triton
def test_tiny_upstream_gradients_keep_their_precision():
    layout = on_device(packed_layout([300]))
    inputs = make_inputs(layout, 300, groups=1, group=1, dim=64, index_dim=64, dtype=torch.float16)
    # Long index keys bring the gradient of the queries back into fp16's range, where it can be compared.
    inputs = inputs._replace(index_q=inputs.index_q * 2.0**-15, index_k=inputs.index_k * 2.0**12)

    def gradient(factor):
        leaves = inputs.clones()
        found = dense_kl(
            *leaves[:3], layout, index_q=leaves.index_q, index_k=leaves.index_k, index_softmax_scale=1.0,
            backend="triton",
        )  # fmt: skip
        return torch.autograd.grad((found.kl * factor).sum(), leaves.index_q)[0][200:].double() / factor

    expected = gradient(1.0)
    assert (gradient(2.0**-24) - expected).norm() < 0.005 * expected.norm()


@needs_triton
def test_an_upstream_gradient_of_zero_gives_zero():
    layout, inputs = small_call()
    leaves = inputs.clones()
    gradients = torch.autograd.grad((run(leaves, layout).kl * 0.0).sum(), leaves[3:])
    assert all((gradient == 0).all() for gradient in gradients)


def test_only_a_layout_of_all_keys_in_order_says_that_its_queries_are_the_keys():
    layout = packed_layout([3, 0, 4])
    assert layout.queries_are_keys
    assert DocumentLayout.dense_batch(2, 5).queries_are_keys
    assert not layout.select_queries(torch.arange(6, -1, -1)).queries_are_keys
    assert not layout.select_queries(slice(0, 5)).queries_are_keys


@needs_triton
def test_two_runs_agree_in_every_bit():
    layout, inputs = small_call()
    runs = []
    for _ in range(2):
        leaves = inputs.clones()
        found = run(leaves, layout)
        runs.append((*found, *torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_triton
def test_a_call_under_activation_recomputation_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    layout, inputs = small_call()

    def loss(*leaves):
        found = run(Inputs(*leaves), layout)
        return found.out.float().sum() + found.kl.sum()

    first, second = inputs.clones(), inputs.clones()
    expected = torch.autograd.grad(loss(*first), first)
    found = torch.autograd.grad(checkpoint(loss, *second, use_reentrant=False), second)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_triton
def test_no_queries_attend_to_nothing():
    layout, inputs = small_call()
    leaves = Inputs(*(t[:0] if n in ("q", "index_q") else t for n, t in inputs._asdict().items())).clones()
    found = run(leaves, layout.select_queries(slice(0, 0)))
    assert found.out.shape == (0, 2, 64)
    assert found.kl.shape == (0, 1)
    gradients = torch.autograd.grad(found.out.sum() + found.kl.sum(), leaves)
    assert all((gradient == 0).all() for gradient in gradients)


@needs_triton
@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED, ids=str)
def test_what_the_kernels_cannot_run_is_refused_with_the_reason(change, reason):
    with pytest.raises(RuntimeError, match=f"cannot run with backend='triton': {reason}"):
        run(five_tokens(**change), on_device(packed_layout([5])))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize(
    ("kl_teacher", "dtype"), [("group_mean", torch.bfloat16), ("per_head", torch.float16)], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [
        ([700, 1, 0, 1300], 2, 16, 128, 128),
        ([1111], 4, 16, 128, 128),
        ([700, 700], 2, 5, 64, 128),
        ([900], 4, 1, 128, 64),
    ],
    ids=str,
)
def test_larger_sizes_on_a_gpu(shape, kl_teacher, dtype):
    lengths, groups, group, dim, index_dim = shape
    check(
        packed_layout(lengths), sum(lengths), groups=groups, group=group, dim=dim, index_dim=index_dim,
        kl_teacher=kl_teacher, dtype=dtype,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_queries_of_larger_documents_on_a_gpu(dtype):
    layout = packed_layout([1500, 300, 900])
    # The two stretches that a rank of a context-parallel group holds.
    chosen = torch.cat([torch.arange(400, 700), torch.arange(1900, 2200)])
    check(
        layout.select_queries(chosen), 2700, groups=2, group=16, dim=128, index_dim=128,
        kl_teacher="group_mean", dtype=dtype,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_cudnn_is_taken_for_plain_batches_only():
    from msa_kernels.dense_kl.library import choose_library

    def is_taken(layout):
        queries, keys = (torch.zeros(count, 1, 64, device=DEVICE) for count in (layout.num_queries, 1000))
        return choose_library(queries, keys, layout) is not None

    plain = DocumentLayout.dense_batch(2, 500, device=DEVICE)
    assert is_taken(plain)
    assert not is_taken(plain.select_queries(slice(None)))
    assert not is_taken(on_device(packed_layout([499, 501])))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_deterministic_algorithms_repeat_in_every_bit_on_a_plain_batch():
    layout = DocumentLayout.dense_batch(2, 1000, device=DEVICE)
    inputs = make_inputs(layout, 2000, groups=2, group=4, dim=128, index_dim=64, dtype=torch.bfloat16)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            leaves = inputs.clones()
            found = run(leaves, layout)
            runs.append((*found, *torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("library", [False, True])
def test_nothing_waits_for_the_gpu_and_no_new_length_compiles_anything(library):
    from msa_kernels.dense_kl import triton_backward, triton_forward, triton_kl, triton_kl_gradient

    modules = (triton_backward, triton_forward, triton_kl, triton_kl_gradient)
    kernels = {
        value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")
    }

    def compiled_after(length):
        layout = on_device(packed_layout([length] if library else [length, 77]))
        layout = dataclasses.replace(layout, queries_are_keys=library)
        keys = layout.num_queries
        inputs = make_inputs(layout, keys, groups=2, group=4, dim=64, index_dim=64, dtype=DTYPES[0])
        leaves = inputs.clones()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run(leaves, layout)
            torch.autograd.grad(found.out.float().sum() + found.kl.sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {kernel: [len(cache[0]) for cache in kernel.device_caches.values()] for kernel in kernels}

    assert compiled_after(500) == compiled_after(777)
