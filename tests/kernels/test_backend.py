import logging

import pytest
import torch
from kernel_oracles import packed_layout, random_inputs
from msa_kernels import block_select, dense_kl, sparse_attention
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


@pytest.mark.parametrize("op", ["block_select", "sparse_attention", "dense_kl"])
def test_every_op_refuses_triton_on_the_cpu(op):
    inputs = random_inputs(4)
    layout = packed_layout([4])
    block_ids = torch.zeros(4, 2, 1, dtype=torch.int32)
    calls = {
        "block_select": lambda: block_select(
            *inputs[3:], layout, block_size=2, num_selected_blocks=1, backend="triton"
        ),
        "sparse_attention": lambda: sparse_attention(
            *inputs[:3], block_ids, layout, block_size=2, backend="triton"
        ),
        "dense_kl": lambda: dense_kl(*inputs[:3], layout, backend="triton"),
    }
    with pytest.raises(RuntimeError, match=f"{op} cannot run with backend='triton'"):
        calls[op]()
