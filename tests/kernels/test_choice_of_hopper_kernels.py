"""Which inputs of sparse_attention take the kernels for Hopper; nothing is launched."""

import pytest
import torch

pytest.importorskip("triton")
from msa_kernels.sparse_attention import hopper_choice


def tensors(*, heads=32, groups=2, offset=0):
    """q, k and v of 4 tokens; k begins ``offset`` elements behind a multiple of 16 bytes."""
    k = torch.zeros(4 * groups * 64 + 8, dtype=torch.bfloat16)
    first = -k.data_ptr() % 16 // 2 + offset
    k = k[first : first + 4 * groups * 64].view(4, groups, 64)
    return torch.zeros(4, heads, 64, dtype=torch.bfloat16), k, torch.zeros_like(k)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(hopper_choice.triton, "__version__", "3.6.0")
    monkeypatch.setattr(hopper_choice.triton.knobs.runtime, "interpret", False)


@pytest.mark.parametrize("heads", [16, 32])
def test_groups_of_8_and_16_heads_take_them(hopper, heads):
    assert hopper_choice.takes_hopper_kernels(*tensors(heads=heads))


@pytest.mark.parametrize("heads", [2, 8, 24])
def test_other_groups_do_not(hopper, heads):
    assert not hopper_choice.takes_hopper_kernels(*tensors(heads=heads))


@pytest.mark.parametrize(("dim", "block_size"), [(128, 128), (64, 128), (128, 64)])
def test_the_backward_kernel_takes_one_size(hopper, dim, block_size):
    q, k = torch.zeros(4, 32, dim, dtype=torch.bfloat16), torch.zeros(4, 2, dim, dtype=torch.bfloat16)
    takes = hopper_choice.takes_hopper_backward(q, k, k, q, block_size)
    assert takes == (dim == block_size == 128)
    misaligned = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert not hopper_choice.takes_hopper_backward(q, k, k, misaligned, block_size)


def test_misaligned_inputs_do_not(hopper):
    assert not hopper_choice.takes_hopper_kernels(*tensors(offset=1))


@pytest.mark.parametrize("capability", [(8, 0), (9, 5), (10, 0)])
def test_other_gpus_do_not(hopper, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert not hopper_choice.takes_hopper_kernels(*tensors())


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "3.60.0"])
def test_other_releases_of_triton_and_its_interpreter_do_not(hopper, monkeypatch, caplog, version):
    monkeypatch.setattr(hopper_choice.triton, "__version__", version)
    for _ in range(2):
        assert not hopper_choice.takes_hopper_kernels(*tensors())
    assert [record.args for record in caplog.records] == [("3.6.x", version)]
    monkeypatch.setattr(hopper_choice.triton, "__version__", "3.6.0")
    monkeypatch.setattr(hopper_choice.triton.knobs.runtime, "interpret", True)
    assert not hopper_choice.takes_hopper_kernels(*tensors())
