"""The benchmarks of decoding: their checks, their bytes, and the suite on a CPU."""

import pytest
import torch
from benchmarks import decode, registry, rows, run, work

TINY = registry.TINY


@pytest.fixture(scope="module")
def decoding():
    return decode.Problem(registry.decode_shapes(tiny=True)["128k-b16"], TINY, torch.device("cpu"))


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
