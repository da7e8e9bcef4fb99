"""The shapes, selections and amounts of work that the benchmarks measure are what they say."""

import json

import pytest
import torch
from benchmarks import ours, registry, work

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
