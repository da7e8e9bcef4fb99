"""FLOPs of a step: pairs against brute force, totals against Megatron, ratios of arXiv 2606.13392."""

from types import SimpleNamespace

import pytest
import torch

from megatron_msa.errors import ConfigError
from megatron_msa.phases import Phase
from megatron_msa.training.flops import causal_pairs, sparse_pairs, step_flops
from megatron_msa.training.parameter_count import count_parameters

VOCABULARY = 1000


def config(**changes):
    """The paper's standard attention, small elsewhere; names as in Megatron's TransformerConfig."""
    values = {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 64,
        "num_query_groups": 4,
        "kv_channels": 128,
        "ffn_hidden_size": 640,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "gated_linear_unit": True,
        "attention_output_gate": False,
        "num_moe_experts": None,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": None,
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": None,
        "mtp_num_layers": None,
        "msa_indexer_head_dim": 128,
        "pattern": None,
    } | changes
    pattern = values.pop("pattern") or [1] * values["num_layers"]
    return SimpleNamespace(**values, msa_layer_pattern=lambda: pattern)


MOE = {
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 96,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 160,
}


def flops(config, phase, lengths=(4096, 300), blocks=(128, 4), **changes):
    pairs = {"causal_pairs": causal_pairs(lengths), "sparse_pairs": sparse_pairs(lengths, *blocks)}
    arguments = (
        {"padded_vocab_size": VOCABULARY, "num_tokens": sum(lengths), "phase": phase} | pairs | changes
    )
    return step_flops(config, **arguments)


def brute_force_pairs(length, block_size, num_selected_blocks):
    """Count the keys of each query: those of its own block, and whole earlier blocks."""
    total = 0
    for position in range(length):
        own = position // block_size
        earlier = min(own, num_selected_blocks - 1)
        total += earlier * block_size + position - own * block_size + 1
    return total


@pytest.mark.parametrize(
    ("block_size", "num_selected_blocks"), [(1, 1), (1, 3), (4, 1), (4, 3), (16, 2), (7, 5)]
)
def test_sparse_pairs_are_those_that_counting_every_query_gives(block_size, num_selected_blocks):
    for length in range(130):
        expected = brute_force_pairs(length, block_size, num_selected_blocks)
        assert sparse_pairs([length], block_size, num_selected_blocks) == expected


def test_pairs_of_a_tensor_are_those_of_the_integers_and_stay_a_tensor():
    lengths = [0, 1, 5, 128, 2047, 2048, 2049, 100_000, 2**20]
    for dtype in (torch.int32, torch.int64):
        tensor = torch.tensor(lengths, dtype=dtype)
        causal, sparse = causal_pairs(tensor), sparse_pairs(tensor, 128, 16)
        assert causal.shape == sparse.shape == ()
        assert causal.dtype == sparse.dtype == torch.int64
        assert causal.item() == causal_pairs(lengths)
        assert sparse.item() == sparse_pairs(lengths, 128, 16)


def test_documents_that_fit_in_the_selected_blocks_are_attended_in_full():
    assert sparse_pairs([2048, 17], 128, 16) == causal_pairs([2048, 17])
    assert sparse_pairs([2049], 128, 16) < causal_pairs([2049])


def attention_ratio(causal, sparse):
    """Forward attention FLOPs of dense GQA over those of MSA at the paper's standard sizes."""
    query_heads, groups, head_dim = 64, 4, 128
    dense = 4 * head_dim * query_heads * causal
    return dense / (4 * head_dim * query_heads * sparse + 2 * head_dim * groups * causal)


@pytest.mark.parametrize(
    ("length", "paper", "exact"),
    [(2**13, 1.9, 2.2), (2**15, 6.4, 6.7), (2**17, 16.0, 16.3), (2**20, 28.4, 28.5)],
)
def test_the_attention_ratio_is_the_papers_or_a_little_better_with_exact_pairs(length, paper, exact):
    # The paper's figures take every query to attend to k B = 2,048 keys, and N^2 / 2 causal pairs. The first
    # 2,048 queries see fewer, and later ones see on average half of their own block.
    bound = length * 16 * 128
    assert round(attention_ratio(length**2 / 2, bound), 1) == paper
    pairs = causal_pairs([length]), sparse_pairs([length], 128, 16)
    assert pairs[1] < bound
    assert round(attention_ratio(*pairs), 1) == exact


def test_a_million_more_tokens_of_context_add_the_cost_of_the_cost_model():
    # Attention alone: what pairs add, tokens held fixed, for one layer of the standard size.
    one = config(num_layers=1)
    empty = {"num_tokens": 1000, "causal_pairs": 0, "sparse_pairs": 0}
    full = empty | {"causal_pairs": 10**6, "sparse_pairs": 10**5}

    def added(phase):
        return flops(one, phase, **full).executed - flops(one, phase, **empty).executed

    attention, index = 14 * 128 * 64, 2 * 128 * 4
    assert added("dense") == attention * 10**6
    assert added("sparse") == attention * 10**5 + index * 10**6 + 3 * index * 10**5
    assert added("warmup") == attention * 10**6 + 4 * index * 10**6
    assert added("index_only") == 6 * 128 * 64 * 10**6 + 4 * index * 10**6


def test_linear_work_is_six_flops_per_active_weight_and_token():
    model = config(**MOE, pattern=[0, 0, 0, 0], mtp_num_layers=2)
    weights = count_parameters(model, padded_vocab_size=VOCABULARY, untied_embeddings=True)
    norms = weights.by_part["norms"] + 2 * 5 * model.hidden_size  # those of the MTP layers
    matrices = weights.active - norms + 2 * model.hidden_size * VOCABULARY  # the head runs once per MTP layer
    step = flops(model, "dense", num_tokens=77, causal_pairs=0, sparse_pairs=0)
    assert step.executed == step.dense_equivalent == 6 * 77 * matrices


def test_index_projections_have_no_input_gradient():
    model = config()
    weights = model.num_layers * model.hidden_size * (4 + 1) * 128
    step = flops(model, "sparse", num_tokens=77, causal_pairs=0, sparse_pairs=0)
    assert step.executed - step.dense_equivalent == 4 * 77 * weights


def test_a_frozen_backbone_costs_its_forward_pass_only():
    model = config(**MOE)
    empty = {"num_tokens": 77, "causal_pairs": 0, "sparse_pairs": 0}
    index_projections = 4 * 77 * model.num_layers * model.hidden_size * (4 + 1) * 128
    frozen = flops(model, "index_only", **empty)
    assert 3 * (frozen.executed - index_projections) == frozen.dense_equivalent


def test_the_dense_phase_executes_the_dense_equivalent():
    step = flops(config(**MOE), "dense")
    assert step.executed == step.dense_equivalent


def test_the_dense_equivalent_depends_on_neither_phase_nor_selection():
    figures = {
        flops(config(**MOE), phase, blocks=(128, k)).dense_equivalent for phase in Phase for k in (2, 9)
    }
    assert len(figures) == 1


def test_full_attention_layers_cost_the_same_in_every_phase():
    model = config(pattern=[0, 0, 0, 0])
    assert (
        flops(model, "sparse").executed == flops(model, "warmup").executed == flops(model, "dense").executed
    )


def test_each_msa_layer_saves_the_same_in_the_sparse_phase():
    def executed(*pattern):
        return flops(config(pattern=list(pattern)), "sparse", lengths=(65536,)).executed

    saved = executed(0, 0, 0, 0) - executed(1, 0, 0, 0)
    assert saved > 0
    assert executed(0, 0, 0, 0) - executed(1, 0, 1, 1) == 3 * saved


def test_idle_experts_cost_only_their_column_of_the_router():
    model = {"num_moe_experts": 8, "moe_ffn_hidden_size": 96}
    more = flops(config(**model | {"num_moe_experts": 64}), "dense").executed
    assert more - flops(config(**model), "dense").executed == 6 * (4096 + 300) * 4 * 256 * (64 - 8)


@pytest.mark.parametrize("changes", [{}, MOE, MOE | {"mtp_num_layers": 2}, {"attention_output_gate": True}])
def test_the_dense_figure_agrees_with_megatron_up_to_the_documented_differences(changes):
    from megatron.training.training import num_floating_point_operations

    model = config(**changes, pattern=[0, 0, 0, 0])
    length, batch = 8192, 3
    args = SimpleNamespace(
        **vars(model),
        seq_length=length,
        swiglu=True,
        num_experts=model.num_moe_experts,
        moe_latent_size=None,
        group_query_attention=True,
        multi_latent_attention=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
        padded_vocab_size=VOCABULARY,
    )
    megatron = num_floating_point_operations(args, batch)
    ours = flops(model, "dense", lengths=[length] * batch).dense_equivalent

    tokens, mtp = batch * length, model.mtp_num_layers or 0
    layers = 4 + mtp
    head_width = model.kv_channels * model.num_attention_heads
    recomputed_scores = 2 * head_width * causal_pairs([length] * batch) * layers
    diagonal = 12 * head_width * (tokens / 2) * layers  # N (N + 1) / 2 - N^2 / 2
    moe_layers = sum(changes.get("moe_layer_freq", [])) + (mtp if "moe_layer_freq" in changes else 0)
    router = 6 * tokens * model.hidden_size * (model.num_moe_experts or 0) * moe_layers
    norms = 6 * tokens * 3 * model.hidden_size * mtp
    assert ours == pytest.approx(megatron + recomputed_scores + diagonal + router - norms, rel=1e-12)
    # Without the scores recomputed by fused attention kernels the two are the same count.
    assert ours - recomputed_scores == pytest.approx(megatron, rel=0.01)


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="cooldown"):
        flops(config(), "cooldown")


def test_a_model_that_is_not_counted_is_refused():
    with pytest.raises(ConfigError, match="--multi-latent-attention"):
        flops(config(multi_latent_attention=True), "dense")
