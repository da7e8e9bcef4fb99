"""The mapping tables and their transforms, against definitions written out element by element."""

import pytest
import torch
from torch import Tensor

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()

from megatron_msa.checkpoint.hf.families import FAMILIES  # noqa: E402
from megatron_msa.checkpoint.hf.mapping import Part, Rule, map_names  # noqa: E402
from megatron_msa.checkpoint.hf.transforms import TRANSFORMS, Geometry  # noqa: E402
from megatron_msa.errors import ConfigError  # noqa: E402

HEADS, GROUPS, DIM, HIDDEN = 6, 2, 4, 5
GEOMETRY = Geometry(
    heads=HEADS,
    groups=GROUPS,
    head_dim=DIM,
    vocab_size=7,
    padded_vocab_size=12,
    vision_heads=3,
    patch_kernel=(3, 2, 4, 4),
)


def qkv() -> list[Tensor]:
    return [torch.randn(heads * DIM, HIDDEN) for heads in (HEADS, GROUPS, GROUPS)]


def test_q_k_and_v_are_interleaved_by_group() -> None:
    """Megatron's `get_query_key_value_tensors` splits [groups, (heads of the group + 2) * head dim]."""
    query, key, value = qkv()
    merged = TRANSFORMS["qkv"].to_megatron([query, key, value], GEOMETRY)
    per_group = HEADS // GROUPS
    row = 0
    for group in range(GROUPS):
        for head in range(group * per_group, (group + 1) * per_group):
            for channel in range(DIM):
                assert torch.equal(merged[row], query[head * DIM + channel])
                row += 1
        for matrix in (key, value):
            for channel in range(DIM):
                assert torch.equal(merged[row], matrix[group * DIM + channel])
                row += 1
    assert row == len(merged)


def test_the_encoders_q_k_and_v_are_interleaved_by_head() -> None:
    """Three heads of two channels, weights and biases alike."""
    query, key, value = (100.0 * kind + torch.arange(6.0) for kind in range(3))
    merged = TRANSFORMS["vision_qkv"].to_megatron([query, key, value], GEOMETRY)
    assert merged.tolist() == [
        0, 1, 100, 101, 200, 201, 2, 3, 102, 103, 202, 203, 4, 5, 104, 105, 204, 205
    ]  # fmt: skip


def test_gate_rows_lie_above_up_rows() -> None:
    gate, up = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
    merged = TRANSFORMS["rows"].to_megatron([gate, up], GEOMETRY)
    assert torch.equal(merged[:3], gate)
    assert torch.equal(merged[3:], up)


def test_the_vocabulary_is_padded_with_zeros() -> None:
    table = torch.randn(7, HIDDEN)
    padded = TRANSFORMS["vocabulary"].to_megatron([table], GEOMETRY)
    assert padded.shape == (12, HIDDEN)
    assert torch.equal(padded[:7], table)
    assert not padded[7:].any()


@pytest.mark.parametrize(("shift", "dtype"), [(-1, torch.bfloat16), (1, torch.float32)])
def test_gains_move_in_fp32(shift: int, dtype: torch.dtype) -> None:
    """A bf16 gain of 1 + 2^-10 does not exist, but the one around zero does."""
    gain = torch.tensor([2.0**-10, 1.5, -0.25], dtype=dtype)
    geometry = Geometry(heads=1, groups=1, head_dim=1, vocab_size=1, padded_vocab_size=1, gain_shift=shift)
    moved = TRANSFORMS["gain"].to_megatron([gain], geometry)
    assert moved.tolist() == [value + shift for value in gain.tolist()]
    (back,) = TRANSFORMS["gain"].to_hf(moved, geometry)
    assert back.tolist() == gain.tolist()


EXAMPLES = {
    "copy": lambda: [torch.randn(3, 4)],
    "rows": lambda: [torch.randn(3, 4), torch.randn(3, 4)],
    "qkv": qkv,
    "gain": lambda: [torch.randn(3)],
    "vocabulary": lambda: [torch.randn(7, 3)],
    "vision_qkv": lambda: [torch.randn(6) for _ in range(3)],
    "patch_kernel": lambda: [torch.randn(5, 3, 2, 4, 4)],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_is_undone_exactly(name: str) -> None:
    parts = EXAMPLES[name]()
    back = TRANSFORMS[name].to_hf(TRANSFORMS[name].to_megatron(parts, GEOMETRY), GEOMETRY)
    assert len(back) == len(parts)
    assert all(torch.equal(one, other) for one, other in zip(back, parts, strict=True))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_no_name_stands_in_two_lines_of_a_table(family) -> None:
    own = [rule.megatron for rule in family.rules]
    hf = [name for rule in family.rules for name in rule.hf]
    assert len(set(own)) == len(own)
    assert len(set(hf)) == len(hf)
    assert all(rule.transform in TRANSFORMS for rule in family.rules)


def test_a_rule_gives_the_parts_of_a_name() -> None:
    rule = Rule("layers.{layer}.experts.{expert}.w", ("m.{layer}.gate[{expert}]", "m.{layer}.e{expert}.up"))
    assert rule.parts("layers.11.experts.3.w") == [Part("m.11.gate", 3), Part("m.11.e3.up")]
    assert rule.parts("layersX11.experts.3.w") is None
    assert rule.parts("layers.11.experts.3.w.more") is None
    assert str(Part("m", 3)) == "m[3]"


def test_a_tensor_without_a_line_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Family has no place for 2 tensors of the Megatron model: b, c"):
        map_names([Rule("a", ("x",))], ["a", "b", "c"], "Family")
