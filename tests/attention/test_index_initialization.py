"""Index branches derived from the attention heads of their layer, against scores computed directly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_msa.attention.index_initialization import (
    AttentionHeads,
    IndexHeads,
    attention_heads,
    check_method,
    derive,
)
from megatron_msa.errors import ConfigError
from tests.attention.tiny import tiny_config, tiny_model

HIDDEN = 40


def make_heads(groups: int, head_dim: int, rotary: int, **changes: Any) -> AttentionHeads:
    """Random heads without a norm; the inputs have very different sizes."""
    values: dict[str, Any] = {
        "query": torch.randn(groups, 3, head_dim, HIDDEN, dtype=torch.float64),
        "key": torch.randn(groups, head_dim, HIDDEN, dtype=torch.float64),
        "input_gain": torch.logspace(-1, 1, HIDDEN, dtype=torch.float64),
        "has_norm": False,
        "weight_size": 0.1,
        "softmax_scale": 0.37,
        "rotary_dims": rotary,
    }
    return AttentionHeads(**values | changes)


def rotate(x: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """Rotary embedding of [tokens, ..., d] by token number, written out as complex multiplication."""
    turned, still = x[..., :rotary], x[..., rotary:]
    if interleaved:
        pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
    else:
        pairs = torch.complex(*turned.chunk(2, dim=-1))
    positions = torch.arange(x.shape[0], dtype=torch.float64).view(-1, *(1,) * (x.dim() - 1))
    frequencies = 0.3 ** torch.arange(rotary // 2, dtype=torch.float64)
    pairs = pairs * torch.exp(1j * positions * frequencies)
    if interleaved:
        return torch.cat([torch.view_as_real(pairs).flatten(-2), still], dim=-1)
    return torch.cat([pairs.real, pairs.imag, still], dim=-1)


def mean_scores(heads: AttentionHeads, x: Tensor) -> Tensor:
    """[groups, tokens, tokens]: the mean of a group's scaled attention scores."""
    q = rotate(torch.einsum("nc,rgdc->nrgd", x, heads.query), heads.rotary_dims, heads.rotary_interleaved)
    k = rotate(torch.einsum("nc,rdc->nrd", x, heads.key), heads.rotary_dims, heads.rotary_interleaved)
    return heads.softmax_scale * torch.einsum("irgd,jrd->rgij", q, k).mean(dim=1)


def index_scores(index: IndexHeads, heads: AttentionHeads, x: Tensor) -> Tensor:
    """[groups, tokens, tokens]: what the index branch computes from its parameters."""
    q = rotate(torch.einsum("nc,rdc->nrd", x, index.query), heads.rotary_dims, heads.rotary_interleaved)
    k = rotate(torch.einsum("nc,dc->nd", x, index.key), heads.rotary_dims, heads.rotary_interleaved)
    return torch.einsum("ird,jd->rij", q, k) * index.key.shape[0] ** -0.5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("method", ["mean", "low_rank"])
def test_with_one_group_the_scores_are_those_of_the_attention(method, interleaved):
    heads = make_heads(groups=1, head_dim=10, rotary=6, rotary_interleaved=interleaved)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    index = derive(method, heads, 10)
    torch.testing.assert_close(index_scores(index, heads, x), mean_scores(heads, x), rtol=1e-9, atol=1e-9)


def test_with_enough_dimensions_the_scores_are_those_of_every_group():
    heads = make_heads(groups=3, head_dim=5, rotary=0)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(
        index_scores(derive("low_rank", heads, 15), heads, x), mean_scores(heads, x), rtol=1e-9, atol=1e-9
    )


def bilinear_forms(heads: AttentionHeads, query: Tensor, key: Tensor, interleaved: bool) -> list[Tensor]:
    """For white inputs, per frequency and for the rest: [groups * hidden, hidden], real or complex."""
    q, k = query * heads.input_gain, key * heads.input_gain
    rotary = heads.rotary_dims
    if interleaved:
        first, second = slice(0, rotary, 2), slice(1, rotary, 2)
    else:
        first, second = slice(0, rotary // 2), slice(rotary // 2, rotary)
    a, b = torch.complex(q[:, first], q[:, second]), torch.complex(k[:, first], k[:, second])
    forms = [a[:, f, :, None].conj() * b[:, f, None, :] for f in range(rotary // 2)]
    forms.append(q[:, rotary:].mT @ k[:, rotary:])
    return [form.flatten(0, 1) for form in forms]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("index_head_dim", [8, 11, 17])
def test_no_shared_key_of_that_rank_has_a_smaller_error(index_head_dim, interleaved):
    groups, head_dim, rotary = 3, 11, 6
    heads = make_heads(groups, head_dim, rotary, rotary_interleaved=interleaved)
    index = derive("low_rank", heads, index_head_dim)
    # Undo the scale, which the other tests are about.
    query = index.query / (heads.softmax_scale * index_head_dim**0.5)
    wanted = bilinear_forms(heads, heads.query.mean(dim=1), heads.key, interleaved)
    found = bilinear_forms(heads, query, index.key.expand(groups, -1, -1), interleaved)
    for place, (target, result) in enumerate(zip(wanted, found, strict=True)):
        rank = 1 if place < rotary // 2 else index_head_dim - rotary
        smallest = torch.linalg.svdvals(target)[rank:].square().sum()
        error = (result - target).abs().square().sum()
        torch.testing.assert_close(error, smallest, rtol=1e-8, atol=1e-8 * float(target.abs().square().sum()))


@pytest.mark.parametrize("method", ["mean", "low_rank"])
def test_behind_norms_the_scores_start_at_the_scale_of_the_linear_ones(method):
    """With norms on index_q and index_k, whose gains must give back what the norms take away."""
    heads = make_heads(groups=2, head_dim=64, rotary=32, has_norm=True)
    index = derive(method, heads, 64)
    x = torch.randn(200, HIDDEN, dtype=torch.float64) * heads.input_gain
    q = torch.einsum("nc,rdc->nrd", x, index.query)
    k = torch.einsum("nc,dc->nd", x, index.key)
    assert index.query.square().mean().sqrt() == pytest.approx(heads.weight_size)
    assert index.key.square().mean().sqrt() == pytest.approx(heads.weight_size)
    q = index.query_gain * q / q.square().mean(dim=-1, keepdim=True).sqrt()
    k = index.key_gain * k / k.square().mean(dim=-1, keepdim=True).sqrt()
    scores = torch.einsum("ird,jd->rij", rotate(q, 32, False), rotate(k, 32, False)) / 8
    linear = derive(method, make_heads(2, 64, 32, query=heads.query, key=heads.key), 64)
    expected = index_scores(linear, heads, x)
    slope = (scores * expected).sum() / expected.square().sum()
    assert 0.8 < slope < 1.25


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_heads_are_read_from_the_weights_as_megatron_uses_them(gate, zero_centred):
    """One input: its norm over the head is the norm's divisor, so the scores must agree exactly."""
    config = tiny_config(attention_output_gate=gate, layernorm_zero_centered_gamma=zero_centred)
    layer = tiny_model(config).decoder.layers[0]
    attention, norm = layer.self_attention, layer.input_layernorm
    heads = attention_heads(
        config,
        qkv=attention.linear_qkv.weight.detach(),
        input_norm=norm.weight.detach(),
        q_norm=attention.q_layernorm.weight.detach(),
        k_norm=attention.k_layernorm.weight.detach(),
        rotary_dims=4,
    )
    x = torch.randn(5, 1, 32, dtype=torch.float64)
    q, k = attention.get_query_key_value_tensors(x, **({"output_gate": True} if gate else {}))[:2]
    for actual, weight in ((q, heads.query.flatten(0, 1)), (k, heads.key)):
        linear = torch.einsum("sbc,hdc->sbhd", x, weight)
        # They differ by the norm's own size: equal directions, token by token and head by head.
        cosine = torch.nn.functional.cosine_similarity(actual, linear, dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)
    gain = norm.weight.detach() + (1.0 if zero_centred else 0.0)
    torch.testing.assert_close(heads.input_gain, gain)
    # For white inputs times the gain a head's mean square is 1 before the norm's gain.
    q_gain = attention.q_layernorm.weight.detach() + (1.0 if zero_centred else 0.0)
    bare = heads.query / q_gain[:, None] * gain
    sizes = bare.square().sum(dim=(-2, -1)) / bare.shape[-2]
    torch.testing.assert_close(sizes, torch.ones_like(sizes))


def test_a_norm_over_all_heads_divides_them_by_one_number():
    config = tiny_config(msa_full_width_qk_norm=True)
    layer = tiny_model(config).decoder.layers[0]
    attention = layer.self_attention
    heads = attention_heads(
        config,
        qkv=attention.linear_qkv.weight.detach(),
        input_norm=layer.input_layernorm.weight.detach(),
        q_norm=attention.q_layernorm.weight.detach(),
        k_norm=attention.k_layernorm.weight.detach(),
        rotary_dims=4,
    )
    x = torch.randn(5, 1, 32, dtype=torch.float64)
    q = attention.get_query_key_value_tensors(x)[0].flatten(2)
    linear = torch.einsum("sbc,hdc->sbhd", x, heads.query.flatten(0, 1)).flatten(2)
    cosine = torch.nn.functional.cosine_similarity(q, linear, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "index_head_dim", "message"),
    [
        ("best", 16, "'best' is no way to initialise an index branch; allowed: random, mean, low_rank"),
        ("mean", 12, "is 12, but the index initialisation 'mean' fills 16 dimensions"),
        ("low_rank", 7, "is 7, but the index initialisation 'low_rank' fills from 8 to 24 dimensions"),
        ("low_rank", 25, "use that many, or the initialisation 'random'"),
    ],
)
def test_a_head_dimension_that_cannot_be_filled_is_refused(method, index_head_dim, message):
    with pytest.raises(ConfigError, match=message):
        check_method(method, head_dim=16, index_head_dim=index_head_dim, num_groups=2, rotary_dims=8)
    check_method("random", head_dim=16, index_head_dim=25, num_groups=2, rotary_dims=8)
