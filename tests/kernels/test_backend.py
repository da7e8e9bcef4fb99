import logging

import pytest
import torch
from decode_inputs import decoding
from kernel_oracles import packed_layout, random_inputs
from msa_kernels import block_select, decode_attention, decode_select, dense_kl, sparse_attention
from msa_kernels.common import backend
from msa_kernels.common.backend import Implementation, Op


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())


def example_op(refusal=None, triton=True):
    implementation = Implementation(run=lambda value: f"triton {value}", refusal=lambda value: refusal)
    loader = (lambda: implementation) if triton else None
    return Op(name="example", reference=lambda value: f"reference {value}", triton=loader)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_triton_runs_where_it_can(wanted):
    assert example_op().run(wanted, 1) == "triton 1"


def test_the_reference_runs_when_asked_for():
    assert example_op().run("reference", 1) == "reference 1"


def test_triton_where_it_cannot_run_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match="example cannot run with backend='triton': inputs are on cpu"):
        example_op(refusal="inputs are on cpu").run("triton", 1)


def test_an_implementation_that_cannot_be_imported_is_a_reason():
    def load():
        raise ImportError("No module named 'triton'")

    op = Op(name="example", reference=lambda value: value, triton=load)
    with pytest.raises(RuntimeError, match=r"could not be imported \(No module named 'triton'\)"):
        op.run("triton", 1)
    assert op.run("auto", 1) == 1


def test_auto_falls_back_and_says_each_reason_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert example_op(refusal="inputs are on cpu").run("auto", 1) == "reference 1"
        assert example_op(triton=False).run("auto", 1) == "reference 1"
    assert [record.getMessage() for record in caplog.records] == [
        "example runs its PyTorch reference, not Triton: inputs are on cpu",
        "example runs its PyTorch reference, not Triton: this op has no Triton implementation",
    ]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, reference; got 'cuda'"):
        example_op().run("cuda", 1)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU: one of another kind need not be there."""

    is_cuda = True


def call_with_triton(op, kind=torch.Tensor):
    """Calls an op with inputs of that class whose shapes and dtypes its kernels take."""
    sizes = {"heads": 4, "groups": 2, "dim": 64, "index_dim": 64, "dtype": torch.float16}
    q, k, v, index_q, index_k = (each.as_subclass(kind) for each in random_inputs(4, value_dim=64, **sizes))
    layout = packed_layout([4])
    block_ids = torch.zeros(4, 2, 1, dtype=torch.int32)
    step = decoding([70], block_size=64, **sizes)
    calls = {
        "block_select": lambda: block_select(
            index_q, index_k, layout, block_size=64, num_selected_blocks=1, backend="triton"
        ),
        "sparse_attention": lambda: sparse_attention(
            q, k, v, block_ids, layout, block_size=64, backend="triton"
        ),
        "dense_kl": lambda: dense_kl(q, k, v, layout, backend="triton"),
        "decode_select": lambda: decode_select(
            step.select[0].as_subclass(kind), *step.select[1:], top_k=1, backend="triton"
        ),
        "decode_attention": lambda: decode_attention(
            step.attend[0].as_subclass(kind), *step.attend[1:], None, backend="triton"
        ),
    }
    return calls[op]()


ops_with_kernels = pytest.mark.parametrize(
    "op", ["block_select", "sparse_attention", "dense_kl", "decode_select", "decode_attention"]
)


@ops_with_kernels
def test_every_op_refuses_triton_on_the_cpu(op):
    pytest.importorskip("triton")
    message = f"{op} cannot run with backend='triton': the inputs are on cpu, not on a CUDA device"
    with pytest.raises(RuntimeError, match=message):
        call_with_triton(op)


@ops_with_kernels
def test_every_op_refuses_triton_on_a_gpu_before_hopper(op, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    message = f"{op} cannot run with backend='triton': it needs a GPU of compute capability 9.0"
    with pytest.raises(RuntimeError, match=message):
        call_with_triton(op, OnGpu)
