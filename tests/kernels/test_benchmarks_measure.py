"""How the benchmarks time and check: calls take turns, and a wrong result is found and not timed."""

import pytest
import torch
from benchmarks import checks, ours, registry, timing, topk
from benchmarks.candidate import Call, Candidate, Experiment, Unavailable
from benchmarks.checks import Verdict
from benchmarks.measure import Ceilings, measure
from benchmarks.rows import Row
from msa_kernels import AttentionOutput, block_select

CPU = torch.device("cpu")
TINY = registry.TINY


class FakeClock:
    """Every call takes the milliseconds that it returns; keeps the order of the calls."""

    def __init__(self):
        self.order = []

    def time(self, call):
        result = call()
        self.order.append(result)
        return float(result if isinstance(result, int | float) else 1), result


def test_calls_take_turns_until_each_has_its_rounds():
    clock = FakeClock()
    samples = timing.round_robin(
        {"a": lambda: 1, "b": lambda: 20, "c": lambda: 300}, {"a": 3, "b": 1, "c": 2}, clock
    )
    assert clock.order == [1, 20, 300, 1, 300, 1]
    assert samples == {"a": [1, 1, 1], "b": [20], "c": [300, 300]}


def test_median_and_quantiles():
    assert timing.Times.of([5, 1, 4, 2, 3, 6]) == (3.5, 2, 5, 6)
    assert timing.Times.of([7]) == (7, 7, 7, 1)


def test_slow_calls_get_the_fewest_rounds_and_fast_ones_the_most():
    assert timing.rounds_within(1500, 5000) == 3
    assert timing.rounds_within(1500, 150) == 10
    assert timing.rounds_within(1500, 0) == 20


def candidate(name="ours", *, result=5, errors=(), is_ours=True, start=None, **options):
    calls = []

    def run():
        calls.append(name)
        return result

    call = Call(run, lambda _: Verdict(tuple(errors), 2.0 if errors else 0.5))
    made = Candidate(
        op="forward",
        name=name,
        start=start or (lambda: call),
        flops=10**9,
        bytes=10**6,
        is_ours=is_ours,
        **options,
    )
    return made, calls


def measured(*candidates, clock=None) -> list[Row]:
    clock = clock or FakeClock()
    experiment = Experiment("real", registry.single_document("4k", 8), list(candidates))
    ceilings = Ceilings(CPU, torch.float32, FakeClock(), tiny=True)
    return measure(experiment, clock, timing.Memory(CPU), ceilings, {"gpu": "none", "commit": "abc"})


def test_a_row_holds_times_rates_and_what_they_depend_on():
    (row,) = measured(candidate(result=5)[0])
    assert (row.check, row.ms, row.ms_p20, row.repeats) == ("passed", 5, 5, 20)
    assert row.tflops == pytest.approx(0.2)
    assert row.tbps == pytest.approx(0.0002)
    assert row.share_of_matmul == pytest.approx(0.2 / row.matmul_tflops)
    assert (row.gpu, row.commit, row.queries) == ("none", "abc", 8)


def test_a_wrong_result_is_not_timed():
    wrong, calls = candidate(errors=["out: error 1"])
    right, _ = candidate("other")
    first, second = measured(wrong, right)
    assert first.check == "failed: out: error 1"
    assert first.ms is None
    assert len(calls) == 2
    assert second.passed


def test_a_candidate_that_raises_is_recorded_and_the_others_are_timed():
    def missing():
        raise Unavailable("the package is not installed")

    def broken():
        raise ValueError("no kernel\nmore")

    found = measured(candidate("a", start=missing)[0], candidate("b", start=broken)[0], candidate("c")[0])
    assert [row.check for row in found] == [
        "skipped: the package is not installed",
        "failed: ValueError: no kernel",
        "passed",
    ]
    assert [row.ms for row in found] == [None, None, 5]


def test_a_slow_candidate_is_timed_once_with_or_without_a_call_before():
    slow, calls = candidate(once=True, warm=False)
    (row,) = measured(slow)
    assert len(calls) == 1
    assert (row.ms, row.repeats, row.check) == (5, 1, "passed")
    slow, calls = candidate(once=True)
    (row,) = measured(slow)
    assert len(calls) == 2
    assert (row.ms, row.repeats, row.check) == (5, 1, "passed")


@pytest.fixture(scope="module")
def problem():
    return ours.Problem(registry.contexts(tiny=True)["1m"], TINY, CPU, needs_gradients=True)


def with_change(output: AttentionOutput, name: str, change: float, row: int) -> AttentionOutput:
    changed = getattr(output, name).detach().clone()
    changed[row] += change
    return output._replace(**{name: changed})


@pytest.mark.parametrize("name", ["out", "lse", "kl"])
def test_the_check_of_outputs_finds_one_wrong_query(problem, name):
    block_ids = problem.block_ids("random")
    output = problem.attend(block_ids, with_kl=True)
    assert problem.check_forward(output, block_ids).passed
    row = int(problem.rows[3])
    verdict = problem.check_forward(with_change(output, name, 0.05, row), block_ids)
    assert [error.split(":")[0] for error in verdict.errors] == [name]
    verdict = problem.check_forward(with_change(output, name, float("nan"), row), block_ids)
    assert not verdict.passed


@pytest.mark.parametrize("place", range(5))
def test_the_check_of_training_finds_one_wrong_gradient_row(problem, place):
    block_ids = problem.block_ids("random")

    def run_with(upstream, change):
        output = problem.attend(block_ids, with_kl=True)
        gradients = [each.clone() for each in ours.gradients(output, problem.inputs, upstream)]
        largest = gradients[place].flatten(1).norm(dim=-1).argmax()
        gradients[place][largest] *= 1 + change
        return ours.detached(output), gradients

    assert problem.check_training(lambda upstream: run_with(upstream, 0.0), block_ids).passed
    verdict = problem.check_training(lambda upstream: run_with(upstream, 0.1), block_ids)
    names = ("dq", "dk", "dv", "dindex_q", "dindex_k")
    assert [error.split(":")[0] for error in verdict.errors] == [names[place]]


def test_the_check_of_training_finds_a_gradient_in_a_query_without_upstream(problem):
    block_ids = problem.block_ids("random")

    def run_with(upstream):
        output = problem.attend(block_ids, with_kl=True)
        gradients = [each.clone() for each in ours.gradients(output, problem.inputs, upstream)]
        silent = next(row for row in range(len(gradients[0])) if row not in problem.rows)
        gradients[0][silent, 0, 0] = 1e-3
        return ours.detached(output), gradients

    assert problem.check_training(run_with, block_ids).errors[0].startswith("dq of other queries")


def test_errors_are_those_of_the_worst_row():
    expected = torch.ones(1000, 2, 16)
    found = expected.clone()
    found[500, 1] *= 1.05
    assert checks.row_error(found, expected) == pytest.approx(0.05, rel=1e-3)
    assert checks.gradient_error(found, expected) == pytest.approx(0.05 / 1.05, rel=1e-3)
    expected[300] = 0
    assert checks.gradient_error(found, expected) == pytest.approx(1 / 0.05, rel=1e-3)


def test_the_check_of_the_selection_finds_wrong_blocks_order_and_logsumexp(problem):
    found = block_select(
        *problem.inputs[3:], problem.layout, block_size=TINY.block_size, num_selected_blocks=TINY.slots
    )
    assert problem.check_selection(found).passed
    rows_late = problem.rows[problem.layout.query_position[problem.rows] >= 5 * TINY.block_size]

    wrong = found.block_ids.clone()
    unused = next(block for block in range(5) if block not in wrong[rows_late[0], 0].tolist())
    wrong[rows_late, :, 0] = unused
    assert "selections" in problem.check_selection(found._replace(block_ids=wrong)).errors[0]
    assert (
        "local block" in problem.check_selection(found._replace(block_ids=found.block_ids.flip(-1))).errors[0]
    )
    assert "index_lse" in problem.check_selection(found._replace(index_lse=found.index_lse + 0.01)).errors[0]


def test_the_check_of_the_top_k_finds_one_wrong_row():
    scores = topk.Scores(registry.single_document("one", 64), TINY, CPU)
    call = topk.torch_topk(scores).start()
    assert call.check(call.run()).passed
    ids = call.run().indices.int()
    ids[-1, 0] = ids[-1, -1]
    assert not scores.check(ids).passed
