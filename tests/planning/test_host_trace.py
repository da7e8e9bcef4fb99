"""The host's time per part of a layer, from a trace that is written by hand."""

import gzip
import json
from pathlib import Path

import pytest

from tools import host_trace

MAIN, AUTOGRAD = 1, 2
BACKWARD = "autograd::engine::evaluate_function: "


def event(
    name: str, thread: int, start: float, duration: float, category: str = "cpu_op"
) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": start, "dur": duration}


def step(start: float) -> list[dict[str, object]]:
    """A dense layer and two expert layers of two experts; microseconds."""
    forward = [
        event("_SparseAttention", MAIN, 10_000, 100),  # to the next one: 8 ms, dense
        event("_SparseAttention", MAIN, 18_000, 100),  # 20 ms, of which 4 in products and 1 in a gathering
        event("_GroupedLinear", MAIN, 20_000, 1_000),
        event("_GroupedLinear", MAIN, 22_000, 3_000),
        event("c10d::allgather_into_tensor_coalesced_", MAIN, 26_000, 1_000),
        event("_SparseAttention", MAIN, 38_000, 100),
        event("_GroupedLinear", MAIN, 40_000, 1_000),
        event("_GroupedLinear", MAIN, 42_000, 3_000),
    ]
    backward = [
        event(f"{BACKWARD}_GroupedLinearBackward", AUTOGRAD, 60_000, 2_000),
        event(f"{BACKWARD}_GroupedLinearBackward", AUTOGRAD, 63_000, 4_000),
        event(
            f"{BACKWARD}_SparseAttentionBackward", AUTOGRAD, 70_000, 100
        ),  # 30 ms, 6 in products, 5 in a check
        event(f"{BACKWARD}_GroupedLinearBackward", AUTOGRAD, 72_000, 2_000),
        event(f"{BACKWARD}torch::autograd::AccumulateGrad", AUTOGRAD, 75_000, 500),
        event(f"{BACKWARD}torch::autograd::AccumulateGrad", AUTOGRAD, 76_000, 5_000),
        event("aten::isnan", AUTOGRAD, 77_000, 100),
        event(f"{BACKWARD}_GroupedLinearBackward", AUTOGRAD, 82_000, 4_000),
        event(f"{BACKWARD}_SparseAttentionBackward", AUTOGRAD, 100_000, 100),  # 12 ms, dense
        event(f"{BACKWARD}_SparseAttentionBackward", AUTOGRAD, 112_000, 100),
    ]
    moved = [each | {"ts": each["ts"] + start} for each in forward + backward]  # type: ignore[operator]
    return [event("ProfilerStep#3", MAIN, start, 150_000, "user_annotation"), *moved]


def test_parts_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": step(0) + step(200_000)}, file)
    assert host_trace.main([str(path), "--experts", "2"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert (parts["steps"], parts["experts"], parts["layers"], parts["moe_layers"]) == (2, 2, 3, 2)
    assert parts["moe_forward"] == pytest.approx(20 - 4 - 1)
    assert parts["expert_forward"] == pytest.approx(4 / 2)
    assert parts["moe_backward"] == pytest.approx(30 - 6 - 5 - 2 * 2 * 0.5)
    assert parts["expert_backward"] == pytest.approx(6 / 2 + 2 * 0.5)
    assert (parts["dense_forward"], parts["dense_backward"]) == (8, 12)
    assert parts["buckets"] == pytest.approx(5 + 1)
    assert parts["optimizer"] == pytest.approx(150 - 112.1)
    # Nothing is counted twice and nothing is lost.
    layers = 2 * (15 + 17 + 2 * (2 + 4)) + 8 + 12
    assert layers + parts["ends"] + parts["buckets"] + parts["optimizer"] == pytest.approx(150)


def test_a_trace_without_profiled_steps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": []}))
    assert host_trace.main([str(path), "--experts", "2"]) == 2
    assert "has no profiled step" in capsys.readouterr().err
