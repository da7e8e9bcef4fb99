"""The references on a GPU: same results, and no waiting of the host for the device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_oracles import packed_layout, random_inputs
from msa_kernels import DocumentLayout, block_select, dense_kl, selection_quality, sparse_attention
from msa_kernels.common import chunks
from torch._subclasses.fake_tensor import FakeTensorMode

LENGTHS = [9, 0, 1, 30]
NUM_KEYS = sum(LENGTHS)


def run_every_op(leaves, layout):
    index = {"index_q": leaves.index_q, "index_k": leaves.index_k}
    options = {"block_size": 3, "backend": "reference"}
    block_ids, index_lse = block_select(*leaves[3:], layout, num_selected_blocks=2, **options)
    sparse = sparse_attention(*leaves[:3], block_ids, layout, index_lse=index_lse, **index, **options)
    dense = dense_kl(*leaves[:3], layout, kl_teacher="per_head", backend="reference", **index)
    quality = selection_quality(leaves.q, leaves.k, block_ids, layout, block_size=3, **index)
    return (block_ids, index_lse, *sparse, *dense, *quality)


def gradients(results, leaves):
    loss = sum(tensor.sum() for tensor in results if tensor.requires_grad)
    return torch.autograd.grad(loss, leaves)


def test_no_op_reads_values_back_from_the_device():
    # In a process of its own: where other tests let Megatron run without a GPU, "cuda" means the CPU.
    program = "import test_devices; test_devices.run_every_op_on_a_fake_gpu()"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, timeout=120)


def run_every_op_on_a_fake_gpu():
    """Fake tensors have a device and no values, so that reading one raises. They need no GPU."""
    chunks.MAX_CHUNK_BYTES = 5 * 4 * NUM_KEYS * 8
    real = random_inputs(NUM_KEYS)
    with FakeTensorMode() as mode:
        offsets = mode.from_tensor(torch.tensor([0, *LENGTHS]).cumsum(0)).to("cuda")
        layout = DocumentLayout.from_document_offsets(offsets, max_document_length=30, num_keys=NUM_KEYS)
        leaves = type(real)(*(mode.from_tensor(tensor).to("cuda").requires_grad_() for tensor in real))
        results = run_every_op(leaves, layout)
        DocumentLayout.dense_batch(2, 20, device="cuda")
    assert all(tensor.device.type == "cuda" for tensor in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_results_and_gradients_of_the_cpu_without_a_synchronisation(monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 5 * 4 * NUM_KEYS * 8)
    inputs = random_inputs(NUM_KEYS)
    leaves = inputs.clones()
    expected = run_every_op(leaves, packed_layout(LENGTHS))
    expected_gradients = gradients(expected, leaves)

    gpu_leaves = type(inputs)(*(tensor.cuda() for tensor in inputs)).clones()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).cuda()
    layout = DocumentLayout.from_document_offsets(offsets, max_document_length=30, num_keys=NUM_KEYS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run_every_op(gpu_leaves, layout)
        gpu_gradients = gradients(results, gpu_leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([tensor.cpu() for tensor in results], list(expected))
    torch.testing.assert_close([tensor.cpu() for tensor in gpu_gradients], list(expected_gradients))
