"""Which rank holds which tokens, against Megatron's own cuts and against layouts of production."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import utils as megatron_utils

from megatron_msa.attention.context_parallel import (
    TokenLayout,
    batch_layout,
    causal_pairs_before,
    check_length,
    packed_layout,
)
from megatron_msa.config import LAYOUTS
from megatron_msa.errors import ConfigError

CPU = torch.device("cpu")
PACKS = json.loads((Path(__file__).parents[2] / "kernels/benchmarks/workloads/cp16_192k.json").read_text())


def of_pack(setting: str, offsets: list[int], size: int, *, samples: int = 1, rank: int = 0) -> TokenLayout:
    return packed_layout(setting, offsets, samples=samples, size=size, rank=rank, device=CPU)


def assert_covers(layout: TokenLayout, tokens: int) -> None:
    """Every token belongs to one rank, ranks keep the global order, and ``place`` undoes the cut."""
    assert layout.owned.shape == (layout.size, tokens // layout.size)
    assert sorted(layout.owned.flatten().tolist()) == list(range(tokens))
    assert (layout.owned.diff(dim=1) > 0).all()
    assert torch.equal(layout.owned.flatten()[layout.place], torch.arange(tokens))
    assert torch.equal(layout.local, layout.owned[layout.rank])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("setting", LAYOUTS)
def test_every_token_of_a_batch_has_one_owner(setting, size):
    for rank in range(size):
        layout = batch_layout(setting, batch=3, length=24, size=size, rank=rank, device=CPU)
        assert_covers(layout, 72)
        per_sequence = layout.owned.view(size, 3, -1) - torch.arange(0, 72, 24)[:, None]
        assert (per_sequence == per_sequence[:, :1]).all(), "each sequence is cut alike"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "lengths",
    [[96], [13, 30, 1, 20, 32], [1] * 96, [95, 1], [48, 0, 48]],
    ids=lambda lengths: str(lengths)[:20],
)
@pytest.mark.parametrize("setting", ["auto", "zigzag", "balanced"])
def test_every_token_of_a_pack_has_one_owner_wherever_documents_end(setting, lengths, size):
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert_covers(of_pack(setting, offsets, size), 96)


@pytest.mark.parametrize("size", [2, 4])
def test_zigzag_is_megatrons_cut_of_whole_sequences(monkeypatch, size):
    """Of plain batches, and of the samples of a pack."""
    batch = torch.arange(3 * 48).view(3, 48)
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        expected = megatron_utils.get_batch_on_this_cp_rank({"tokens": batch}, False, cp_group=object())
        plain = batch_layout("zigzag", batch=3, length=48, size=size, rank=rank, device=CPU)
        assert torch.equal(plain.local, expected["tokens"].flatten())
        packed = of_pack("zigzag", [0, 5, 48, 96, 144], size, samples=3, rank=rank)
        assert torch.equal(packed.local, expected["tokens"].flatten())


def test_cut_documents_get_megatrons_rotary_positions():
    """Its RoPE for packed sequences assumes the cut that Transformer Engine makes of each document."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    offsets, size = [0, 16, 24, 56], 2
    table = torch.randn(40, 1, 1, 4, dtype=torch.float64)
    x = torch.randn(56, 2, 4, dtype=torch.float64)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(offsets)])
    whole = apply_rotary_pos_emb(x.unsqueeze(1), table[positions], config, cp_group=object()).squeeze(1)
    for rank in range(size):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        local = of_pack("documents", offsets, size, rank=rank).local
        cut = apply_rotary_pos_emb(
            x[local], table, config, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), cp_group=group
        )
        torch.testing.assert_close(cut, whole[local], rtol=0, atol=0)


def test_pairs_are_those_of_a_walk_over_all_tokens():
    offsets = [0, 5, 5, 12, 30]
    seen, expected = 0, [0]
    for a, b in pairwise(offsets):
        for position in range(b - a):
            seen += position + 1
            expected.append(seen)
    assert causal_pairs_before(offsets, range(31)) == expected


def loads(layout: TokenLayout, offsets: list[int]) -> list[int]:
    """Causal pairs of each rank."""
    position = torch.cat([torch.arange(b - a) for a, b in pairwise(offsets)])
    return [int((position[owned] + 1).sum()) for owned in layout.owned]


@pytest.mark.parametrize("case", PACKS["cases"], ids=lambda case: f"case {case['case_id']}")
def test_balanced_chunks_even_out_real_packs(case):
    offsets, size = case["global_cu_seqlens"], PACKS["cp_size"]
    layout = of_pack("balanced", offsets, size)
    work = loads(layout, offsets)
    mean = sum(work) / size
    assert max(work) / mean < 1.025
    assert sum(work) == causal_pairs_before(offsets, [offsets[-1]])[0]
    zigzag = loads(of_pack("zigzag", offsets, size), offsets)
    assert max(work) <= max(zigzag)


def test_the_balanced_layout_is_the_one_of_production():
    """15 of the 16 published ranks own the same chunks; the last differs in how ties are broken."""
    same = []
    for case in PACKS["cases"]:
        owned = of_pack("balanced", case["global_cu_seqlens"], PACKS["cp_size"]).owned[case["rank"]]
        same.append(owned[:: PACKS["chunk_size"]].tolist() == [1024 * chunk for chunk in case["chunk_ids"]])
    assert sum(same) == 15


def test_short_sequences_get_chunks_that_fit():
    layout = batch_layout("balanced", batch=1, length=60, size=2, rank=0, device=CPU)
    assert_covers(layout, 60)  # 15 tokens to a quarter: chunks of one
    assert max(loads(layout, [0, 60])) - min(loads(layout, [0, 60])) <= 1


@pytest.mark.parametrize(
    ("length", "size", "message"),
    [
        (100, 8, "sequence of 100 tokens .* --context-parallel-size 8: .* multiple of 16 .* 96 or 112"),
        (3, 2, "Use --seq-length 4, or fewer ranks"),
    ],
)
def test_a_sequence_that_cannot_be_cut_is_refused_with_the_lengths_that_can(length, size, message):
    with pytest.raises(ConfigError, match=message):
        check_length(length, size)
    with pytest.raises(ConfigError, match=message):
        batch_layout("zigzag", batch=1, length=length, size=size, rank=0, device=CPU)
    with pytest.raises(ConfigError, match=message):
        of_pack("balanced", [0, length], size)


def test_a_document_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match=r"document 1 of a pack has 6 tokens, .* multiples of 4"):
        of_pack("documents", [0, 8, 14, 16], 2)
