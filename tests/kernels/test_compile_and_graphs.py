"""The ops inside torch.compile, activation recomputation and CUDA graphs: the same results, bit by bit.

On the CPU the reference runs, on a GPU the Triton kernels too.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from kernel_oracles import packed_layout
from msa_kernels import DocumentLayout, block_select, dense_kl, sparse_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
LENGTHS = [200, 0, 1, 119]
TOKENS = sum(LENGTHS)
BLOCK_SIZE = 64
HEADS, GROUPS, DIM = 4, 2, 64

on_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")


def inputs(seed: int = 0) -> list[Tensor]:
    """q, k, v, index_q, index_k."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, DIM), (GROUPS, DIM), (GROUPS, DIM), (GROUPS, DIM), (DIM,)]
    tensors = [torch.randn(TOKENS, *shape, generator=generator) for shape in shapes]
    return [tensor.to(DEVICE, DTYPE).requires_grad_() for tensor in tensors]


def layout(lengths: list[int] = LENGTHS) -> DocumentLayout:
    """Documents of different lengths: for plain batches dense_kl may use cuDNN, which is not repeatable."""
    offsets = packed_layout(lengths).document_offsets.to(DEVICE)
    return DocumentLayout.from_document_offsets(offsets, max_document_length=TOKENS, num_keys=TOKENS)


def sparse(q, k, v, index_q, index_k, documents, backend="auto"):
    """Something to compile before, between and behind the ops."""
    index_q = torch.nn.functional.silu(index_q)
    block_ids = block_select(
        index_q,
        index_k,
        documents,
        block_size=BLOCK_SIZE,
        num_selected_blocks=2,
        with_lse=False,
        backend=backend,
    ).block_ids
    q = q * 1.5
    out, _, kl = sparse_attention(
        q,
        k,
        v,
        block_ids,
        documents,
        block_size=BLOCK_SIZE,
        index_q=index_q,
        index_k=index_k,
        backend=backend,
    )
    return out.float().square().mean() + kl.mean()


def dense(q, k, v, index_q, index_k, documents, backend="auto"):
    index_q = torch.nn.functional.silu(index_q)
    out, _, kl = dense_kl(q * 1.5, k, v, documents, index_q=index_q, index_k=index_k, backend=backend)
    return out.float().square().mean() + kl.mean()


def loss_and_gradients(function, tensors, documents):
    loss = function(*tensors, documents)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


both_steps = pytest.mark.parametrize("step", [sparse, dense], ids=lambda step: step.__name__)


@both_steps
def test_a_compiled_step_gives_equal_gradients_and_is_not_compiled_again(step):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counted)
    counts = []
    for seed, lengths in enumerate([LENGTHS, [19, 300, 1, 0], [20, 300], [7, 300, 13], [40] * 8]):
        documents = layout(lengths)
        found = loss_and_gradients(compiled, inputs(seed), documents)
        expected = loss_and_gradients(step, inputs(seed), documents)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        counts.append(counted.frame_count)
    # One graph before each op and one behind the last. The first other number of documents makes PyTorch
    # compile once more, for any number.
    graphs = 3 if step is sparse else 2
    assert counts[:2] == [graphs] * 2, counts
    assert counts[2] <= 2 * graphs, counts
    assert counts[3:] == counts[2:3] * 2, counts


@pytest.mark.parametrize("use_reentrant", [False, True])
@both_steps
def test_recomputed_activations_give_equal_gradients(step, use_reentrant):
    def recomputed(*arguments):
        return checkpoint(step, *arguments, use_reentrant=use_reentrant)

    found = loss_and_gradients_by_backward(recomputed)
    expected = loss_and_gradients_by_backward(step)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def loss_and_gradients_by_backward(function):
    # Reentrant recomputation does not work under torch.autograd.grad.
    tensors = inputs()
    loss = function(*tensors, layout())
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in tensors)]


def captured(step, static):
    """A CUDA graph of ``step``, and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step(*static)
    return graph, written


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("with_gradients", [False, True])
@both_steps
def test_a_cuda_graph_replays_with_new_inputs_selections_and_documents(step, with_gradients):
    def run(tensors, documents):
        if with_gradients:
            return loss_and_gradients(step, tensors, documents)
        with torch.no_grad():
            return [step(*tensors, documents)]

    static, documents = inputs(), layout()
    graph, written = captured(run, (static, documents))
    for seed, lengths in [(1, LENGTHS), (2, [1, 250, 0, 69]), (3, [0, 0, 320, 0])]:
        other = layout(lengths)
        with torch.no_grad():
            for place, tensor in zip(static, inputs(seed), strict=True):
                place.copy_(tensor)
            for name in ("document_offsets", "query_document", "query_position"):
                getattr(documents, name).copy_(getattr(other, name))
        graph.replay()
        expected = run(inputs(seed), other)
        torch.testing.assert_close(written, expected, rtol=0, atol=0)


@pytest.mark.gpu
@on_gpu
def test_the_step_of_these_tests_runs_on_the_kernels():
    loss_and_gradients(lambda *arguments: sparse(*arguments, backend="triton"), inputs(), layout())
