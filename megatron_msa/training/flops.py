"""Floating-point operations of one training step, in closed form.

Two figures: what was executed, and what the same step of a dense model would take. A multiply-add counts
as 2. Per layer, with H_q query heads of d channels, H_kv GQA groups, index head dimension d_i, C causal
(query, key) pairs, and P pairs that the main attention visits (C, or E in the sparse phase):

    projections, MLP, router, head   forward 2 per weight and token; backward twice that
    index projections                forward 2 per weight and token; backward once that (the input is
                                     detached, so no input gradient is computed)
    attention forward                2 (d + d) H_q P        q.k and P.v
    attention backward               2 (3d + 2d) H_q P      dV, dP, dQ, dK and the scores once more
    index scores                     2 d_i H_kv C           every query ranks all blocks that it sees
    KL gradient                      2 (3 d_i) H_kv P       index scores once more, d(index_q), d(index_k)

as in the cost model of MiniMax Sparse Attention, arXiv 2606.13392. The KL teacher needs the main scores,
which the attention backward has at hand. What an MSA layer executes:

    dense        attention over C; no index branch
    warmup       attention, index scores and KL gradient over C
    sparse       index scores over C; attention and KL gradient over E
    index_only   the forward pass of warmup; backward only what the index branch needs: its weight gradients,
                 the KL gradient over C, and 2 d H_q C for the teacher's scores, since there is no attention
                 backward to share them with. Gradients of the frozen backbone are not counted, whether or not
                 the implementation computes them: their result is thrown away.

Full-attention layers take attention over C in every phase. Of the experts the top-k routed ones and the
shared ones count. Not counted: activation recomputation, norms, RoPE, softmax, ranking of blocks, the
optimizer, and the sampled measurement of recall.

Against Megatron's `num_floating_point_operations` (0.19.2), the dense-equivalent figure has the scores
that the attention backward recomputes (14 instead of 12 d H_q per pair), N (N + 1) / 2 causal pairs
instead of N^2 / 2, and the router and shared-expert gate; it leaves out the three norms of an MTP layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_msa.phases import Phase
from megatron_msa.training.parameter_count import (
    attention_matrix_size,
    check_countable,
    expert_ffn_size,
    index_head_dim,
    index_matrix_size,
    layer_kinds,
    mlp_matrix_size,
    mtp_projection_size,
    router_matrix_size,
    shared_expert_matrix_size,
)

if TYPE_CHECKING:
    from megatron_msa.config import MSATransformerConfig
    from megatron_msa.training.parameter_count import LayerKind

# Matrix products over the attended pairs, each 2 d H_q per pair.
FORWARD_PRODUCTS = 2
# Fused kernels recompute the scores in the backward pass, because the scores do not fit in memory. With 4
# instead of 5 the figures would follow the convention of Megatron and PaLM: backward is twice the forward.
_BACKWARD_PRODUCTS = 5
_KL_PRODUCTS = 3  # each 2 d_i H_kv per pair


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step over all devices.

    Attributes:
        executed: of the phase that ran. Utilisation (MFU) may be derived from this figure only.
        dense_equivalent: of the same step of the same model with full causal attention in every layer and no
            index branch. By this figure a sparse step can exceed the hardware's peak.
    """

    executed: float
    dense_equivalent: float


def causal_pairs(document_lengths: Tensor | Iterable[int]) -> Any:
    """C: (query, key) pairs of full causal attention, the sum over documents of n (n + 1) / 2.

    Args:
        document_lengths: integers, or an integer tensor on any device.

    Returns:
        An integer; for a tensor an int64 tensor without dimensions on its device, so that nobody waits for
        it.
    """
    if isinstance(document_lengths, Tensor):
        n = document_lengths.long()
        return (n * (n + 1) // 2).sum()
    return sum(n * (n + 1) // 2 for n in document_lengths)


def sparse_pairs(document_lengths: Tensor | Iterable[int], block_size: int, num_selected_blocks: int) -> Any:
    """E: (query, key) pairs that sparse attention visits, per query head; see `causal_pairs` for the types.

    A query at position p of its document sees p + 1 keys while all its blocks are selected (p // B < k),
    otherwise k - 1 whole blocks and its own block up to itself: (k - 1) B + p % B + 1.

    Args:
        document_lengths: tokens of each document.
        block_size: B.
        num_selected_blocks: k, the query's own block included.
    """
    limit = block_size * num_selected_blocks
    if isinstance(document_lengths, Tensor):
        n = document_lengths.long()
        return _sparse_pairs(n, n.clamp(max=limit), block_size, num_selected_blocks).sum()
    return sum(_sparse_pairs(n, min(n, limit), block_size, num_selected_blocks) for n in document_lengths)


def _sparse_pairs(length: Any, dense_part: Any, block_size: int, num_selected_blocks: int) -> Any:
    """``dense_part`` is min(length, k B). Integers or int64 tensors alike."""
    rest = length - dense_part  # these positions start at a block boundary
    whole_blocks, tail = rest // block_size, rest % block_size
    own_block = whole_blocks * (block_size * (block_size + 1) // 2) + tail * (tail + 1) // 2
    return dense_part * (dense_part + 1) // 2 + rest * ((num_selected_blocks - 1) * block_size) + own_block


def step_flops(
    config: MSATransformerConfig,
    *,
    padded_vocab_size: int,
    num_tokens: int,
    causal_pairs: float,
    sparse_pairs: float,
    phase: str,
) -> StepFlops:
    """FLOPs of a training step (forward and backward) over the whole global batch.

    Args:
        config: Megatron's TransformerConfig with the msa_* fields.
        padded_vocab_size: rows of the output projection; it runs once, and once more per MTP layer.
        num_tokens: tokens that the model processes in the step.
        causal_pairs: C of the step, per head and layer (see `causal_pairs`).
        sparse_pairs: E of the step, per head and layer (see `sparse_pairs`).
        phase: "dense", "index_only", "warmup" or "sparse".

    Raises:
        ConfigError: the model has parts that are not counted here.
        ValueError: an unknown phase.
    """
    check_countable(config)
    phase = Phase(phase)
    layers = layer_kinds(config)
    mtp_depth = getattr(config, "mtp_num_layers", None) or 0
    layers += layers[-1:] * mtp_depth
    num_msa = sum(kind.is_msa for kind in layers)

    vocabulary = config.hidden_size * padded_vocab_size
    weights = sum(layer_matrix_size(config, kind) for kind in layers) + vocabulary
    weights += mtp_depth * (mtp_projection_size(config) + vocabulary)
    backbone = 2 * num_tokens * weights  # forward
    index_projections = 2 * num_tokens * index_matrix_size(config)  # forward
    # One matrix product, per attended pair.
    main = 2 * config.kv_channels * config.num_attention_heads
    index = 2 * index_head_dim(config) * (config.num_query_groups or config.num_attention_heads)

    attention = FORWARD_PRODUCTS + _BACKWARD_PRODUCTS
    full_layer = attention * main * causal_pairs
    dense_equivalent = 3 * backbone + len(layers) * full_layer
    if phase is Phase.DENSE:
        return StepFlops(executed=dense_equivalent, dense_equivalent=dense_equivalent)

    scores_and_projections = index * causal_pairs + 2 * index_projections
    if phase is Phase.INDEX_ONLY:
        teacher_and_kl = (main + _KL_PRODUCTS * index) * causal_pairs
        executed = backbone + len(layers) * FORWARD_PRODUCTS * main * causal_pairs
        executed += num_msa * (scores_and_projections + teacher_and_kl)
    else:
        attended = sparse_pairs if phase is Phase.SPARSE else causal_pairs
        attention_and_kl = (attention * main + _KL_PRODUCTS * index) * attended
        executed = 3 * backbone + (len(layers) - num_msa) * full_layer
        executed += num_msa * (scores_and_projections + attention_and_kl)
    return StepFlops(executed=executed, dense_equivalent=dense_equivalent)


def layer_matrix_size(config: MSATransformerConfig, kind: LayerKind) -> int:
    """Weights of a layer that a token is multiplied by, without the index branch."""
    size = attention_matrix_size(config)
    if not kind.is_moe:
        return size + mlp_matrix_size(config, config.ffn_hidden_size)
    routed = config.moe_router_topk * mlp_matrix_size(config, expert_ffn_size(config))
    return size + routed + shared_expert_matrix_size(config) + router_matrix_size(config)
