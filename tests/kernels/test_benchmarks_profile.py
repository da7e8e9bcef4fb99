"""The profile of one call of the operators."""

import csv
import re

from benchmarks import profile_kernels


def test_the_profile_names_what_a_call_runs(tmp_path, capsys):
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--shapes",
        "4k",
        "--ops",
        "prefill",
        "train",
        "--patterns",
        "local",
    ]
    assert profile_kernels.main([*arguments, "--output", str(tmp_path), "--commit", "abc", "--top", "1"]) == 0
    with open(tmp_path / "profile.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["shape"], row["op"], row["pattern"], row["commit"]) for row in rows} == {
        ("4k", "prefill", "local", "abc"),
        ("4k", "train", "local", "abc"),
    }
    prefill = [row for row in rows if row["op"] == "prefill"]
    times = [float(row["ms"]) for row in prefill]
    assert times == sorted(times, reverse=True)
    assert "aten::_softmax" in {row["kernel"] for row in prefill}
    # A training call has gradients: it runs what a forward call does not.
    assert {row["kernel"] for row in rows if row["op"] == "train"} - {row["kernel"] for row in prefill}
    printed = capsys.readouterr().out
    total = re.search(r"4k prefill local: (\d+\.\d\d) ms in kernels", printed)
    assert total
    # The sum is printed with two digits; the file's summands are rounded to four.
    assert abs(float(total[1]) - sum(times)) <= 0.5e-2 + 0.5e-4 * len(times)
    assert printed.count(" x  ") == 2


def test_an_unknown_shape_is_refused_with_the_known_ones(capsys):
    assert profile_kernels.main(["--device", "cpu", "--tiny", "--shapes", "5k"]) == 2
    assert "known are 4k," in capsys.readouterr().err


def test_names_of_kernels_lose_what_fills_lines():
    sort = (
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::X<int, 3> >(int*, int)"
    )
    assert profile_kernels.without_template(sort) == "DeviceRadixSortOnesweepKernel"
    hidden = "void at::native::(anonymous namespace)::searchsorted_cuda_kernel<int, int>(int*)"
    assert profile_kernels.without_template(hidden) == "searchsorted_cuda_kernel"
    for name in ("_combine_kernel", "aten::copy_", "Memset (Device)"):
        assert profile_kernels.without_template(name) == name
