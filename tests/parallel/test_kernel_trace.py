"""What a trace says about overlap, on a trace made by hand."""

import pytest

from tools.kernel_trace import Kernels, length, overlap


def kernel(name: str, start: float, end: float, correlation: int) -> dict:
    return {
        "cat": "kernel",
        "name": name,
        "ts": start,
        "dur": end - start,
        "args": {"correlation": correlation},
    }


def launch(at: float, correlation: int, thread: int = 1) -> dict:
    return {
        "cat": "cuda_driver",
        "name": "launch",
        "ts": at,
        "tid": thread,
        "args": {"correlation": correlation},
    }


def named(name: str, start: float, end: float, thread: int = 1) -> dict:
    return {"cat": "user_annotation", "name": name, "ts": start, "dur": end - start, "tid": thread}


TRACE = [
    named("select", 0, 10),
    launch(1, 1),
    launch(2, 2),
    launch(2, 4, thread=2),  # at the same time, elsewhere
    launch(20, 3),
    kernel("scores", 100, 300, 1),
    kernel("topk", 280, 400, 2),  # overlaps the first: counted once
    kernel("gemm", 500, 600, 3),
    kernel("other thread", 610, 620, 4),
    kernel("ncclAllGather", 50, 150, 5),  # half of it beside the selection
    kernel("ncclReduceScatter", 380, 580, 6),  # a tenth beside the selection, four tenths beside the product
]


def test_collectives_are_measured_against_what_runs_beside_them():
    found = Kernels.of_trace(TRACE).collectives("select")
    gather, scatter = found["each"]
    assert (gather["hidden"], gather["beside select"]) == (0.5, 0.5)
    assert (scatter["hidden"], scatter["beside select"]) == (0.5, 0.1)
    assert found["total_ms"] == pytest.approx(0.3)
    assert found["exposed_ms"] == pytest.approx(0.15)
    assert found["hidden"] == 0.5
    assert found["share"] == pytest.approx(
        300 / 570, abs=1e-4
    )  # from the first kernel's start to the last's end


def test_kernels_belong_to_the_range_that_launched_them():
    assert Kernels.of_trace(TRACE).summary(["select"])["device_ms"] == {"select": 0.3}


def test_a_trace_without_kernels_has_no_shares():
    assert Kernels([]).collectives("select")["share"] is None


def test_unions_and_intersections():
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert overlap([(0, 10)], [(1, 2), (1.5, 3), (9, 12)]) == 3
    assert overlap([(0, 1)], [(2, 3)]) == 0
