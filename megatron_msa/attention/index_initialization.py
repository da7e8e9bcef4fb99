"""Initial values of an index branch, derived from the query and key projections of its own layer.

The index score of a GQA group should start as the mean of its heads' attention scores. Linear in the inputs,
that is one bilinear form per group r with G heads (the rotary embedding between i and j left out):

    t_r[i, j] = softmax_scale * x_i^T Q_r^T K_r x_j,    Q_r = mean over h of W_q[r, h],    K_r = W_k[r]

but the index branch has only one key head for all groups. Two ways to get it:

- ``mean``: the groups' mean query heads Q_r, and the mean K of all key heads;
- ``low_rank``: the K, shared by all groups, and A_r with the least squared error of A_r^T K against
  Q_r^T K_r, taken over all groups and over inputs x = gain * u with white u, which is what the input norm
  makes of them. K is then spanned by the leading right singular vectors of the forms stacked over r. The
  rotary embedding keeps frequencies apart, so that this is done once per frequency, with the two dimensions
  it turns as one complex number, and once for all dimensions that it leaves alone.

A norm on q and k acts on a typical input as a division by the head's root mean square and a product with its
gain; both are put into the projections before. The index branch's own norms get the gains that give its
scores the scale of t_r, so that the student starts at the temperature of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError

METHODS = ("random", "mean", "low_rank")
DEFAULT_METHOD = "low_rank"
"""Aligns fastest: docs/conversion.md has the curves."""


@dataclass(frozen=True, kw_only=True)
class AttentionHeads:
    """The heads of one layer that an index branch is derived from, in fp64, as linear maps of typical inputs.

    Letters: R GQA groups, G query heads per group, d head dim.

    Attributes:
        query: [R, G, d, hidden], what the norm on q does included.
        key: [R, d, hidden], the same for k.
        input_gain: [hidden], by which the norm before the projection multiplies.
        has_norm: whether q and k are normalised.
        weight_size: root mean square of the entries of the projection's weight.
        softmax_scale: factor on the scores.
        rotary_dims: number of leading dimensions of a head that the rotary embedding turns.
        rotary_interleaved: whether it turns (2i, 2i + 1) together, and not (i, i + rotary_dims / 2).
    """

    query: Tensor
    key: Tensor
    input_gain: Tensor
    has_norm: bool
    weight_size: float
    softmax_scale: float
    rotary_dims: int
    rotary_interleaved: bool = False


@dataclass(frozen=True)
class IndexHeads:
    """Values for the parameters of an index branch, in fp64.

    Attributes:
        query: [R, d_i, hidden].
        key: [d_i, hidden].
        query_gain: by which the norm of index_q multiplies every dimension; 1 without a norm.
        key_gain: the same for index_k.
    """

    query: Tensor
    key: Tensor
    query_gain: float
    key_gain: float


def check_method(
    method: str, *, head_dim: int, index_head_dim: int, num_groups: int, rotary_dims: int
) -> None:
    """Refuse a head dimension of the index branch that a method cannot fill.

    Raises:
        ConfigError: an unknown method, or too many or too few dimensions; names those that fit.
    """
    if method not in METHODS:
        raise ConfigError(
            f"{method!r} is no way to initialise an index branch; allowed: {', '.join(METHODS)}"
        )
    most = {
        "random": index_head_dim,
        "mean": head_dim,
        "low_rank": rotary_dims + num_groups * (head_dim - rotary_dims),
    }[method]
    least = {"random": 1, "mean": head_dim, "low_rank": rotary_dims}[method]
    if not least <= index_head_dim <= most:
        raise ConfigError(
            f"--msa-indexer-head-dim is {index_head_dim}, but the index initialisation {method!r} fills "
            f"{f'from {least} to {most}' if least < most else most} dimensions from heads of {head_dim} "
            f"dimensions, {rotary_dims} of them rotated; use that many, or the initialisation 'random'"
        )


def attention_heads(
    config: MSATransformerConfig,
    *,
    qkv: Tensor,
    input_norm: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rotary_dims: int,
) -> AttentionHeads:
    """The heads of a layer from its parameters as a checkpoint holds them.

    Args:
        config: of the model.
        qkv: weight of the fused projection, [R * (G + 2) * d, hidden]: group by group G query heads, with an
            output gate G gate heads, the key and the value head.
        input_norm: weight of the norm before it, [hidden].
        q_norm: weight of the norm on q, [d], or for one over all heads [R * G * d]; None without.
        k_norm: weight of the norm on k, [d] or [R * d]; None without.
        rotary_dims: see `AttentionHeads`.
    """
    assert config.num_query_groups is not None
    assert config.kv_channels is not None
    heads = qkv.double().unflatten(0, (config.num_query_groups, -1, config.kv_channels))
    num_queries = (heads.shape[1] - 2) // (2 if config.attention_output_gate else 1)
    has_norm = config.qk_layernorm or config.qk_l2_norm
    shift = 1.0 if config.layernorm_zero_centered_gamma else 0.0
    input_gain = input_norm.double() + shift

    def applied(weight: Tensor, norm: Tensor | None) -> Tensor:
        if has_norm:
            size = _mean_square(weight, input_gain)
            if norm is not None and norm.numel() > weight.shape[-2]:  # one norm over all heads
                size = size.mean()
            weight = weight / size.sqrt()[..., None, None]
        if norm is None:
            return weight
        gain = norm.double() + shift
        return (
            weight * (gain if gain.numel() == weight.shape[-2] else gain.view(weight.shape[:-1]))[..., None]
        )

    return AttentionHeads(
        query=applied(heads[:, :num_queries], q_norm),
        key=applied(heads[:, -2], k_norm),
        input_gain=input_gain,
        has_norm=has_norm,
        weight_size=float(heads.square().mean().sqrt()),
        softmax_scale=config.softmax_scale or config.kv_channels**-0.5,
        rotary_dims=rotary_dims,
        rotary_interleaved=config.rotary_interleaved,
    )


def derive(method: str, heads: AttentionHeads, index_head_dim: int) -> IndexHeads:
    """Initial values of an index branch.

    Args:
        method: "mean" or "low_rank" (values of "random" are Megatron's own initialisation).
        heads: of the same layer.
        index_head_dim: d_i.

    Raises:
        ConfigError: see `check_method`.
    """
    num_groups, _, head_dim, _ = heads.query.shape
    check_method(
        method,
        head_dim=head_dim,
        index_head_dim=index_head_dim,
        num_groups=num_groups,
        rotary_dims=heads.rotary_dims,
    )
    query = heads.query.mean(dim=1)
    if method == "mean":
        key = heads.key.mean(dim=0)
    else:
        query, key = _low_rank(query, heads, index_head_dim)

    # Scores are divided by sqrt(d_i) and should be softmax_scale * (query x) . (key x).
    factor = (heads.softmax_scale * index_head_dim**0.5) ** 0.5
    if not heads.has_norm:
        return IndexHeads(query * factor, key * factor, 1.0, 1.0)
    # What a norm takes away, its gain gives back; all groups share one, so their mean square.
    query_gain = factor * float(_mean_square(query, heads.input_gain).mean().sqrt())
    key_gain = factor * float(_mean_square(key, heads.input_gain).sqrt())
    # The size of a weight before a norm has no effect but on its learning rate: keep that of the layer's own.
    query, key = (_resized(weight, heads.weight_size) for weight in (query, key))
    return IndexHeads(query, key, query_gain, key_gain)


def _mean_square(weight: Tensor, input_gain: Tensor) -> Tensor:
    """Mean square of the outputs of a head [..., d, hidden] for inputs input_gain * u, u white: [...]."""
    return (weight * input_gain).square().sum(dim=(-2, -1)) / weight.shape[-2]


def _resized(weight: Tensor, size: float) -> Tensor:
    return weight * (size / weight.square().mean().sqrt())


def _low_rank(query: Tensor, heads: AttentionHeads, index_head_dim: int) -> tuple[Tensor, Tensor]:
    """A [R, d_i, hidden] and K [d_i, hidden] from Q [R, d, hidden] and the key heads."""
    keys = heads.key
    rotary = heads.rotary_dims
    parts = []
    if rotary:
        q, k = (_as_complex(x[:, :rotary], heads.rotary_interleaved) for x in (query, keys))
        a, k = _shared_keys(q, k, heads.input_gain, rank=1)  # [f, R, 1, hidden], [f, 1, hidden]
        a, k = a.squeeze(2).transpose(0, 1), k.squeeze(1)
        parts.append((_as_real(a, heads.rotary_interleaved), _as_real(k, heads.rotary_interleaved)))
    if index_head_dim > rotary:
        rank = index_head_dim - rotary
        parts.append(_shared_keys(query[:, rotary:], keys[:, rotary:], heads.input_gain, rank=rank))
    return torch.cat([a for a, _ in parts], dim=-2), torch.cat([k for _, k in parts], dim=-2)


def _as_complex(x: Tensor, interleaved: bool) -> Tensor:
    """[R, 2 f, hidden] -> [f, R, 1, hidden]: what one frequency turns as one complex row."""
    first, second = x.unflatten(1, (-1, 2)).unbind(2) if interleaved else x.chunk(2, dim=1)
    return torch.complex(first, second).transpose(0, 1).unsqueeze(2)


def _as_real(x: Tensor, interleaved: bool) -> Tensor:
    """[..., f, hidden] -> [..., 2 f, hidden]."""
    if interleaved:
        return torch.stack((x.real, x.imag), dim=-2).flatten(-3, -2)
    return torch.cat((x.real, x.imag), dim=-2)


def _shared_keys(query: Tensor, keys: Tensor, input_gain: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """A and K of the given rank with the least error of A_r^H K against Q_r^H K_r, summed over the groups r.

    Never forms a [hidden, hidden] matrix. With the rows of all K_r in one matrix B, C = B B^H and D the block
    diagonal of Q_r Q_r^H, the right singular vectors of the stacked forms are v = B^H C^(-1/2) u for the
    eigenvectors u of C^(1/2) D C^(1/2). So K = u^H C^(-1/2) B, and A_r = (block r of C^(1/2) u)^H Q_r.
    The rows of K are orthonormal: index keys are white for white inputs, which a norm changes least.

    Args:
        query, keys: [..., R, m, hidden], real or complex, at least ``rank`` rows over all groups.
        input_gain: [hidden], scale of each input.

    Returns:
        [..., R, rank, hidden] and [..., rank, hidden].
    """
    num_groups, m, _ = query.shape[-3:]
    rows = keys.flatten(-3, -2)
    scaled_rows, scaled_query = rows * input_gain, query * input_gain
    root, inverse_root = _square_roots(scaled_rows @ scaled_rows.mH)
    forms = scaled_query @ scaled_query.mH  # [..., R, m, m]
    # [..., R m, R m] with the forms on the diagonal, from [..., R, m, R, m].
    same_group = torch.eye(num_groups, dtype=forms.dtype, device=forms.device)[:, None, :, None]
    diagonal = (forms.unsqueeze(-2) * same_group).flatten(-4, -3).flatten(-2, -1)
    u = torch.linalg.eigh(root @ diagonal @ root).eigenvectors[..., -rank:].flip(-1)
    mix = (root @ u).unflatten(-2, (num_groups, m))  # [..., R, m, rank]
    return mix.mH @ query, (inverse_root @ u).mH @ rows


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and its pseudo-inverse of a positive semidefinite Hermitian matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    relevant = values > 1e-12 * values[..., -1:]
    root = torch.where(relevant, values, 0.0).sqrt()
    inverse = torch.where(relevant, 1.0 / root, 0.0)
    return (vectors * root.unsqueeze(-2)) @ vectors.mH, (vectors * inverse.unsqueeze(-2)) @ vectors.mH
