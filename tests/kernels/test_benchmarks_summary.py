"""The summary, the tables and the plot that the benchmarks make of their rows."""

import pytest
from benchmarks import plot, rows, summary, tables
from benchmarks.rows import Row


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
