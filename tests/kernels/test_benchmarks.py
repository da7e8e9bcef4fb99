"""The benchmarks: what they measure is what they say, and a wrong result is neither timed nor summarised."""

import json
import sys
from pathlib import Path

import pytest
import torch
from msa_kernels import AttentionOutput, block_select, sparse_attention

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS.parent))

from benchmarks import checks, decode, ours, plot, registry, rows, run, summary, tables, timing, topk, work  # noqa: E402
from benchmarks.candidate import Call, Candidate, Experiment, Unavailable  # noqa: E402
from benchmarks.checks import Verdict  # noqa: E402
from benchmarks.measure import Ceilings, measure  # noqa: E402
from benchmarks.rows import Row  # noqa: E402

CPU = torch.device("cpu")
TINY = registry.TINY
PATTERNS = ["index", *registry.PATTERNS]


def cases(file: str) -> list[dict]:
    return json.loads((registry.WORKLOADS / file).read_text())["cases"]


REAL = {"cp16_192k.json": registry.real_shapes(), "tiny.json": registry.real_shapes(tiny=True)}
HEADS = {"cp16_192k.json": registry.STANDARD, "tiny.json": TINY}


@pytest.mark.parametrize("file", REAL)
def test_the_real_shapes_have_the_totals_that_the_workload_states(file):
    assert len(REAL[file]) == len(cases(file))
    for shape, case in zip(REAL[file], cases(file), strict=True):
        assert shape.num_queries == case["total_q"]
        assert shape.num_keys == case["total_kv"]
        assert shape.causal_pairs() == case["causal_elements"]
        assert shape.sparse_pairs(HEADS[file]) == case["sparse_elements"]
        assert shape.weight == case["representative_weight"]


@pytest.mark.parametrize("file", REAL)
def test_the_fragments_are_what_the_rank_owns_of_the_pack(file):
    """Every query's place in the pack lies in one of the rank's chunks, and they fill the chunks in order."""
    chunk_size = json.loads((registry.WORKLOADS / file).read_text())["chunk_size"]
    for shape, case in zip(REAL[file], cases(file), strict=True):
        offsets = torch.tensor(case["global_cu_seqlens"])
        owned = torch.cat([torch.arange(chunk_size) + chunk * chunk_size for chunk in case["chunk_ids"]])
        document = torch.searchsorted(offsets, owned, right=True) - 1
        assert torch.equal(shape.positions(), owned - offsets[document])
        layout = shape.layout(CPU)
        assert torch.equal(layout.query_document.long(), document.unique(return_inverse=True)[1])
        last_position = {
            number: int(place)
            for number, place in zip(document.tolist(), owned - offsets[document], strict=True)
        }
        assert [each.keys for each in shape.documents] == [last + 1 for last in last_position.values()]


def test_pairs_are_those_of_brute_force():
    shape = registry.real_shapes(tiny=True)[1]
    layout = shape.layout(CPU)
    seen = layout.visible_keys(shape.num_keys)
    assert shape.causal_pairs() == int(seen.sum())
    block_ids = registry.select("random", layout, TINY)
    block = layout.key_position(shape.num_keys) // TINY.block_size
    attended = seen & (block_ids[:, 0, :, None] == block).any(1)
    assert shape.sparse_pairs(TINY) == int(attended.sum())


def test_the_single_documents_reach_from_4k_to_1m():
    shapes = registry.contexts()
    assert [shape.num_queries for shape in shapes.values()] == [2**power for power in range(12, 21)]
    assert list(shapes) == ["4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1m"]
    assert all(shape.is_single_document for shape in shapes.values())
    assert not any(shape.is_single_document for shape in registry.real_shapes())


def selection(pattern: str, shape: registry.Shape) -> torch.Tensor:
    return ours.Problem(shape, TINY, CPU, needs_gradients=False).block_ids(pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [*registry.real_shapes(tiny=True), registry.single_document("one", 203)])
def test_a_pattern_selects_as_many_blocks_as_it_may_all_visible_and_the_local_one_last(pattern, shape):
    layout = shape.layout(CPU)
    block_ids = selection(pattern, shape)
    assert block_ids.dtype == torch.int32
    assert block_ids.shape == (shape.num_queries, TINY.groups, TINY.slots)
    local_blocks = (layout.query_position // TINY.block_size).tolist()
    for local, of_query in zip(local_blocks, block_ids.tolist(), strict=True):
        for chosen in of_query:
            count = min(TINY.slots, local + 1)
            assert len(set(chosen[:count])) == count, chosen
            assert all(0 <= block <= local for block in chosen[:count]), chosen
            assert chosen[count - 1] == local
            assert chosen[count:] == [-1] * (TINY.slots - count)


def test_the_patterns_are_what_their_names_say():
    heads = registry.Heads(groups=2, block_size=64, slots=6)
    layout = registry.single_document("one", 12800).layout(CPU)
    chosen = {pattern: registry.select(pattern, layout, heads)[6400:] for pattern in registry.PATTERNS}
    local = (layout.query_position[6400:] // 64)[:, None]

    def shared(block_ids):
        """Share of a query's blocks, the local one left out, that the query before it selected, too."""
        others = block_ids[..., :-1]
        return (others[1:, :, :, None] == others[:-1, :, None, :]).any(-1).double().mean()

    assert 0.85 < shared(chosen["local"]) < 0.95
    assert shared(chosen["random"]) < 0.1
    assert (chosen["hot"] == 0).any(-1).all()
    assert torch.equal(chosen["recent"][:, 0].min(-1).values, local[:, 0] - 5)
    assert not torch.equal(chosen["random"][:, 0], chosen["random"][:, 1])


def test_work_is_that_of_the_paper_at_one_million_tokens():
    """The ratio of dense to MSA FLOPs is 28.4 (arXiv 2606.13392), if a query's own block counts as whole."""
    heads, shape = registry.STANDARD, registry.contexts()["1m"]
    dense = work.attention_forward(heads, shape.causal_pairs())
    ours_ = work.attention_forward(heads, shape.sparse_pairs(heads)) + work.index_scores(
        heads, shape.causal_pairs()
    )
    half_blocks = work.attention_forward(heads, shape.num_queries * (heads.block_size - 1) // 2)
    assert dense / (ours_ + half_blocks) == pytest.approx(28.4, abs=0.05)
    assert work.attention_backward(heads, 1) == 2.5 * work.attention_forward(heads, 1)


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


def row_of(group, op, shape, *, ms, pattern="index", is_ours=1, candidate="msa_kernels", **values) -> Row:
    defaults = {
        "queries": 10,
        "keys": 10,
        "documents": 1,
        "weight": 1,
        "check": "passed",
        "gpu": "G",
        "commit": "c",
    }
    return Row(
        group=group,
        op=op,
        shape=shape,
        pattern=pattern,
        candidate=candidate,
        is_ours=is_ours,
        ms=ms,
        **defaults | values,
    )


def complete_rows() -> list[Row]:
    dense = {"pattern": "", "is_ours": 0}
    found = []
    for op, shape in (("prefill", "1m"), ("prefill", "128k"), ("prefill", "32k"), ("train", "128k")):
        found += [
            row_of("context", op, shape, ms=2.0),
            row_of("context", op, shape, ms=4.0, pattern="local"),
            row_of("context", op, shape, ms=30.0, candidate="cuDNN SDPA", **dense),
            row_of("context", op, shape, ms=20.0, candidate="flash-attn-4", **dense),
        ]
    for op in ("forward", "forward with KL", "backward with KL"):
        for pattern in ("index", "local", "random"):
            found += [
                row_of(
                    "real", op, "real-00", ms=1.0, pattern=pattern, weight=3, tflop=0.3, matmul_tflops=500.0
                ),
                row_of(
                    "real", op, "real-01", ms=5.0, pattern=pattern, weight=1, tflop=0.7, matmul_tflops=500.0
                ),
            ]
    return [
        *found,
        row_of("select", "select", "128k", ms=20.0, tflops=400.0, share_of_matmul=0.5, matmul_tflops=800.0),
        row_of("select", "select with LSE", "128k", ms=25.0, tflops=320.0, share_of_matmul=0.4),
        row_of("topk", "topk", "128k", ms=1.5, pattern=""),
        row_of("topk", "topk", "128k", ms=12.0, candidate="torch.topk", **dense),
        row_of("memory", "train", "256k", ms=300.0, extra_gib=6.5),
        row_of("decode", "decode", "1m-b4", ms=0.5, keys=40, share_of_copy=0.75),
        row_of("decode", "decode 8-bit index", "1m-b4", ms=0.25, keys=40),
        row_of("decode", "decode", "128k-b16", ms=0.5, keys=40),
        row_of("decode", "decode dense", "1m-b4", ms=3.0, candidate="cuDNN SDPA", **dense),
        row_of("decode", "decode dense", "1m-b4", ms=2.0, pattern=""),
        row_of("decode", "decode dense", "128k-b16", ms=1.0, candidate="cuDNN SDPA", **dense),
    ]


def test_the_summary_has_an_entry_per_bar():
    figures = summary.summarize(complete_rows())
    values = {bar.name: figures[bar.name]["value"] for bar in summary.BARS}
    assert values == {
        "prefill_1m_speedup": 10.0,
        "prefill_128k_speedup": 10.0,
        "prefill_32k_speedup": 10.0,
        "train_128k_speedup": 10.0,
        "index_share_128k": 0.5,
        # (3 * 0.3 + 0.7) TFLOP in (3 * 1 + 5) ms at 500 TFLOP/s
        "forward_share_real": pytest.approx(1.6 / 8e-3 / 500),
        "backward_share_real": pytest.approx(1.6 / 8e-3 / 500),
        "topk_speedup": 8.0,
        "extra_gib_256k": 6.5,
        "decode_1m_b4_speedup": 4.0,
        "decode_1m_b4_8bit_speedup": 8.0,
        "decode_128k_b16_speedup": 2.0,
        "decode_1m_b4_byte_share": 0.75,
    }
    first = figures["prefill_1m_speedup"]
    assert (first["best_dense"], first["bar"], first["stretch"]) == ("flash-attn-4", 14.2, 20)
    assert first["reached"] is False
    assert first["other_patterns"] == {"local": 5.0}
    assert figures["extra_gib_256k"]["reached"] is True
    assert (figures["gpu"], figures["commit"]) == ("G", "c")


@pytest.mark.parametrize("name", [bar.name for bar in summary.BARS])
def test_a_wrong_result_of_ours_leaves_its_bar_without_a_value(name):
    found = complete_rows()
    of_bar = {
        "prefill_1m_speedup": ("prefill", "1m"),
        "prefill_128k_speedup": ("prefill", "128k"),
        "prefill_32k_speedup": ("prefill", "32k"),
        "train_128k_speedup": ("train", "128k"),
        "index_share_128k": ("select", "128k"),
        "forward_share_real": ("forward", "real-01"),
        "backward_share_real": ("backward with KL", "real-01"),
        "topk_speedup": ("topk", "128k"),
        "extra_gib_256k": ("train", "256k"),
        "decode_1m_b4_speedup": ("decode", "1m-b4"),
        "decode_1m_b4_8bit_speedup": ("decode 8-bit index", "1m-b4"),
        "decode_128k_b16_speedup": ("decode", "128k-b16"),
        "decode_1m_b4_byte_share": ("decode", "1m-b4"),
    }
    wrong = next(row for row in found if row.is_ours and (row.op, row.shape) == of_bar[name])
    wrong.check, wrong.ms = "failed: out: error 1e-01 > 1e-02", None
    figures = summary.summarize(found)
    assert figures[name]["value"] is None
    assert "out: error" in figures[name]["reason"]
    assert len(figures["wrong_results"]) == 1
    others = [bar.name for bar in summary.BARS if of_bar[bar.name] != of_bar[name]]
    assert all(figures[each]["value"] is not None for each in others)


def test_a_wrong_baseline_is_left_out_and_named():
    found = complete_rows()
    found[3].check, found[3].ms = "failed: dq: error 1", None
    figures = summary.summarize(found)
    assert figures["prefill_1m_speedup"]["best_dense"] == "cuDNN SDPA"
    assert figures["not_measured"] == ["flash-attn-4 (prefill, 1m): failed: dq: error 1"]


def test_decoding_is_compared_with_our_own_dense_kernel_where_that_is_the_fastest():
    found = complete_rows()
    assert summary.summarize(found)["decode_1m_b4_speedup"]["best_dense"] == "msa_kernels"
    own_dense = next(row for row in found if row.op == "decode dense" and row.is_ours)
    own_dense.check = "failed: out: error 1"
    entry = summary.summarize(found)["decode_1m_b4_speedup"]
    assert (entry["best_dense"], entry["value"]) == ("cuDNN SDPA", 6.0)


def test_a_bar_without_its_rows_says_so():
    found = [row for row in complete_rows() if row.group != "memory"]
    entry = summary.summarize(found)["extra_gib_256k"]
    assert entry["value"] is None
    assert "256k" in entry["reason"]


def test_rows_survive_the_file(tmp_path):
    found = complete_rows()
    rows.write(tmp_path / "rows.csv", found)
    assert rows.read(tmp_path / "rows.csv") == found


def test_speedups_of_the_plot_are_against_the_fastest_dense_kernel():
    assert plot.speedups(complete_rows(), "train") == {10: 10.0}


def test_the_tables_show_every_bar():
    found = complete_rows()
    text = tables.everything(found, summary.summarize(found))
    assert "| 14.2x | 20x | **10x** | 2 ms against 20 ms (flash-attn-4), local 5x |" in text
    assert "6.5 GiB" in text


def test_the_whole_path_runs_on_a_cpu(tmp_path, capsys):
    status = run.main(
        ["--device", "cpu", "--tiny", "--suite", "bars", "--output", str(tmp_path), "--commit", "abc"]
    )
    assert status == 0
    found = rows.read(tmp_path / "rows.csv")
    assert {row.group for row in found} == {"topk", "select", "real", "memory", "warmup", "context"}
    assert all(row.passed for row in found if row.op != "topk")
    assert {row.commit for row in found} == {"abc"}
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["prefill_1m_speedup"]["value"] > 0
    assert figures["backward_share_real"]["shapes"] == 2
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run.main(["--table", "--output", str(tmp_path)]) == 0
    assert "select + attend" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed_and_its_bars_have_no_value(tmp_path, monkeypatch, capsys):
    def wrong(*arguments, **options):
        output = sparse_attention(*arguments, **options)
        return output._replace(out=output.out * 1.05)

    monkeypatch.setattr(ours, "sparse_attention", wrong)
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--suite",
        "quick",
        "--only",
        "context",
        "--output",
        str(tmp_path),
    ]
    assert run.main(arguments) == 1
    assert "out: error" in capsys.readouterr().err
    own = [row for row in rows.read(tmp_path / "rows.csv") if row.is_ours]
    assert own
    assert all(row.ms is None and row.check.startswith("failed") for row in own)
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["prefill_32k_speedup"]["value"] is None
    assert len(figures["wrong_results"]) == len(own)


def test_what_does_not_fit_into_the_seconds_is_left_out_and_named(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--suite", "quick", "--only", "topk", "--output", str(tmp_path)]
    assert run.main([*arguments, "--seconds", "1"]) == 0
    assert {row.check for row in rows.read(tmp_path / "rows.csv")} == {"skipped: 1 seconds were given"}
    assert json.loads((tmp_path / "summary.json").read_text())["topk_speedup"]["value"] is None


def test_merge_keeps_what_is_not_measured_again(tmp_path):
    common = ["--device", "cpu", "--tiny", "--suite", "quick", "--merge", "--output", str(tmp_path)]
    assert run.main([*common, "--only", "select", "--commit", "old"]) == 0
    assert run.main([*common, "--only", "topk", "--commit", "new"]) == 0
    found = {(row.group, row.commit) for row in rows.read(tmp_path / "rows.csv")}
    assert found == {("select", "old"), ("topk", "new")}


def test_another_suite_keeps_the_rows_and_entries_that_are_there(tmp_path):
    common = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert run.main([*common, "--suite", "quick", "--only", "topk"]) == 0
    path = tmp_path / "summary.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"model_prefill_128k_speedup": {"value": 3.5}}))
    assert run.main([*common, "--suite", "decode", "--shapes", "1m-b1"]) == 0
    assert {row.group for row in rows.read(tmp_path / "rows.csv")} == {"topk", "decode"}
    assert json.loads(path.read_text())["model_prefill_128k_speedup"] == {"value": 3.5}


@pytest.fixture(scope="module")
def decoding():
    return decode.Problem(registry.decode_shapes(tiny=True)["128k-b16"], TINY, CPU)


def test_the_decode_suite_times_right_results_only(tmp_path):
    common = ["--device", "cpu", "--tiny", "--suite", "decode", "--shapes", "1m-b1"]
    assert run.main([*common, "--output", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "rows.csv")
    assert all(row.passed for row in found)
    assert {(row.op, row.candidate) for row in found if row.op == "decode dense"} == {
        ("decode dense", "msa_kernels"),
        ("decode dense", "SDPA"),
    }


def test_the_checks_of_decoding_find_one_wrong_row(decoding):
    block_ids = decoding.select(eight_bit=False)
    assert decoding.check_selection(block_ids, eight_bit=False).passed
    assert "local block" in decoding.check_selection(block_ids.flip(-1), eight_bit=False).errors[0]
    wrong = block_ids.clone()
    wrong[:8, :, :, 0] = wrong[:8, :, :, 1]
    assert "selections" in decoding.check_selection(wrong, eight_bit=False).errors[0]
    for chosen in (block_ids, None):
        output = decoding.attend(chosen)
        assert decoding.check_output(output, chosen).passed
        output[3, 0, 5] *= 1.05
        assert not decoding.check_output(output, chosen).passed


def test_bytes_of_a_step_are_what_its_tensors_hold(decoding):
    index = decode.index_bytes(decoding, eight_bit=False) - work.bytes_of(decoding.index_query)
    assert index == work.bytes_of(decoding.index_key_cache)
    eight = decode.index_bytes(decoding, eight_bit=True) - work.bytes_of(decoding.index_query)
    assert eight == work.bytes_of(*decoding.index_8)
    chosen = decoding.select(eight_bit=False)
    blocks = int((chosen >= 0).sum())
    pages = work.bytes_of(decoding.key_cache[0], decoding.value_cache[0]) // TINY.groups
    assert decode.attended_bytes(decoding) == blocks * pages + 2 * work.bytes_of(decoding.query)


def test_options_that_cannot_work_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu"])
    assert "needs --tiny" in capsys.readouterr().err
    assert run.main(["--device", "cpu", "--tiny", "--suite", "quick", "--only", "nothing"]) == 2
    assert "context, select, topk, real" in capsys.readouterr().err
    assert run.main(["--table", "--output", str(tmp_path)]) == 2
    assert "run the benchmarks first" in capsys.readouterr().err
