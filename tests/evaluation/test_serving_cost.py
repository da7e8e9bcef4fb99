"""Serving costs against a count pair by pair, and against the accounting of training."""

import pytest
import torch

from megatron_msa.evaluation.serving_cost import cache_bytes_per_token, serving_cost
from megatron_msa.inference.cache import CacheFormat, LayerCache
from megatron_msa.inference.paged_rows import E4M3, PagedRows
from megatron_msa.training.flops import causal_pairs, sparse_pairs, step_flops
from megatron_msa.training.parameter_count import count_parameters
from tests.attention.tiny import tiny_config

VOCABULARY = 64
CONFIG = {
    "msa_layer_freq": "[0,1,1]",
    "num_layers": 3,
}  # block size 4, 3 of them, 4 heads and 2 groups of 8, d_i 12


def attended(position: int) -> int:
    """Keys that a query of an MSA layer attends to, block by block."""
    blocks = range(position // 4 + 1)
    kept = list(blocks)[-3:]  # which blocks does not matter, the local one is always among them
    return sum(len([key for key in range(4 * b, 4 * b + 4) if key <= position]) for b in kept)


@pytest.mark.parametrize("length", [1, 3, 4, 12, 13, 50])
def test_prefill_and_decode_cost_what_each_query_costs(length):
    config = tiny_config(**CONFIG)
    found = serving_cost(config, padded_vocab_size=VOCABULARY, length=length)
    parts = count_parameters(config, padded_vocab_size=VOCABULARY, untied_embeddings=True).by_part
    matrices = 2 * (parts["attention"] + parts["dense_mlp"])
    index_norms = 2 * 2 * 12
    index = 2 * (parts["index_branch"] - index_norms)
    head = 2 * parts["output"]
    pair, index_pair = 4 * 8 * 4, 2 * 12 * 2

    def query(position: int) -> tuple[int, int]:
        sees, visits = position + 1, attended(position)
        sparse = matrices + index + pair * (sees + 2 * visits) + 2 * index_pair * sees
        return sparse, matrices + 3 * pair * sees

    sparse, dense = (sum(column) + head for column in zip(*map(query, range(length)), strict=True))
    assert (found.prefill.executed, found.prefill.dense) == (sparse, dense)
    last_sparse, last_dense = query(length - 1)
    assert (found.decode.executed, found.decode.dense) == (last_sparse + head, last_dense + head)


def test_training_is_three_times_the_forward_pass_and_one_more_score_product():
    """By the accounting of training; its forward pass runs the output projection for every token."""
    config, length = tiny_config(**CONFIG), 37
    forward = serving_cost(config, padded_vocab_size=VOCABULARY, length=length).prefill
    pairs = {
        "causal_pairs": causal_pairs([length]),
        "sparse_pairs": sparse_pairs([length], 4, 3),
    }
    step = step_flops(config, padded_vocab_size=VOCABULARY, num_tokens=length, phase="dense", **pairs)
    more_heads = 2 * 32 * VOCABULARY * (length - 1)
    recomputed_scores = 3 * 2 * 8 * 4 * pairs["causal_pairs"]
    assert step.executed == 3 * (forward.dense + more_heads) + recomputed_scores


@pytest.mark.parametrize("length", [5, 12, 13, 64])
def test_a_decoded_token_reads_index_keys_and_the_chosen_blocks(length):
    config = tiny_config(**CONFIG)
    found = serving_cost(config, padded_vocab_size=VOCABULARY, length=length)
    key_value, index_key = 2 * 2 * 8 * 2, 12 * 2
    assert found.bytes_read_dense == 3 * length * key_value
    msa_layer = length * index_key + attended(length - 1) * key_value
    assert found.bytes_read_sparse == length * key_value + 2 * msa_layer
    eight_bit = serving_cost(
        config, padded_vocab_size=VOCABULARY, length=length, cache_dtype=E4M3, index_key_dtype=E4M3
    )
    assert eight_bit.bytes_read_dense == 3 * length * 2 * 2 * (8 + 4)


def test_bytes_per_token_are_those_of_the_cache_and_of_the_scales():
    found = cache_bytes_per_token(tiny_config(**CONFIG))
    assert found["bf16"] == {"key_value": 3 * 2 * 2 * 8 * 2, "index_key": 2 * 12 * 2}
    assert found["e4m3"] == {"key_value": 3 * 2 * 2 * (8 + 4), "index_key": 2 * (12 + 4)}
    for name, dtype in (("bf16", torch.bfloat16), ("e4m3", E4M3)):
        form = CacheFormat(
            block_size=4,
            groups=2,
            head_dim=8,
            index_head_dim=12,
            selects_blocks=[False, True, True],
            dtype=dtype,
            index_dtype=dtype,
        )
        layers = [LayerCache(form, 1, torch.device("cpu"), has_index=has) for has in form.selects_blocks]
        allocated = {
            "key_value": sum(memory(layer.key) + memory(layer.value) for layer in layers),
            "index_key": sum(memory(layer.index_key) for layer in layers if layer.index_key is not None),
        }
        assert allocated == {part: 4 * number for part, number in found[name].items()}


def memory(rows: PagedRows) -> int:
    return rows.data.nbytes + (0 if rows.scale is None else rows.scale.nbytes)


def test_the_ratio_at_long_contexts_is_that_of_the_cost_model():
    """64 and 4 heads of 128, 16 blocks of 128: attention alone 28.4 times cheaper at 2^20 tokens."""
    config = tiny_config(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=64,
        num_query_groups=4,
        kv_channels=128,
        msa_indexer_head_dim=128,
        msa_block_size=128,
        msa_num_selected_blocks=16,
    )
    prefill = serving_cost(config, padded_vocab_size=8, length=2**20).prefill
    assert prefill.dense / prefill.executed == pytest.approx(28.4, rel=0.01)
