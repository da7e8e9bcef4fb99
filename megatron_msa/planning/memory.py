"""Memory of one rank, in bytes: weights, gradients, optimizer, activations, workspaces, gathered keys.

Activations are counted tensor by tensor as the layers keep them for the backward pass, in bf16 with the
copies that the `local` layers make: their RMSNorm saves its input in fp32 (see
`megatron_msa.attention.rms_norm`). The workspace of the MSA kernels is not computed but measured (`rates`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_msa.planning.layout import Layout
from megatron_msa.planning.rates import KernelRates
from megatron_msa.planning.weights import Model, rank_weights
from megatron_msa.training.parameter_count import expert_ffn_size, index_head_dim, layer_kinds

BF16, FP32 = 2, 4
GIB = 2**30


@dataclass(frozen=True)
class OptimizerSettings:
    """Of Megatron's mixed-precision Adam.

    Attributes:
        is_distributed: whether its state is shared among the replicas (--use-distributed-optimizer).
        gradient_bytes: per parameter; 4 unless --grad-reduce-in-bf16.
    """

    is_distributed: bool
    gradient_bytes: int = FP32


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of one pipeline stage, at the moment when it holds most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept by the layers for the backward passes of all microbatches in flight."""
    layer: float
    """What a layer needs besides while its attention runs: gradients of activations, what it recomputes."""
    feed_forward: float
    """The same while a recomputed feed-forward runs, when the MSA kernels need nothing."""
    workspace: float
    """Of the MSA kernels."""
    gathered_keys: float
    """Index keys, keys and values of all context-parallel ranks, and their gradients in fp32; one layer."""
    loss: float
    """Logits and what the loss makes of them; only where the output projection is."""

    @property
    def total(self) -> float:
        """Backward passes of the loss and of a layer's halves do not overlap: the largest of them counts."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + max(self.layer + self.workspace + self.gathered_keys, self.feed_forward, self.loss)

    @property
    def gib(self) -> float:
        return self.total / GIB

    def in_gib(self) -> dict[str, float]:
        """Each part, in GiB."""
        return {field.name: getattr(self, field.name) / GIB for field in fields(self)}


@dataclass(frozen=True)
class LayerBytes:
    """Per token of a rank: what a layer keeps, and what it needs besides in its backward pass."""

    attention: float
    feed_forward: float
    attention_backward: float
    feed_forward_backward: float

    @property
    def backward(self) -> float:
        """The two halves of a layer run one after the other."""
        return max(self.attention_backward, self.feed_forward_backward)

    @property
    def kept(self) -> float:
        return self.attention + self.feed_forward


def layer_bytes(model: Model, layout: Layout, *, is_moe: bool, is_msa: bool, fp32_norms: bool) -> LayerBytes:
    """Activation bytes of a layer per token of the rank's context-parallel share.

    Args:
        fp32_norms: whether norms keep their input in fp32 (local layers) or in bf16.
    """
    config, tensor = model.config, layout.tensor
    hidden = config.hidden_size
    heads, groups = config.num_attention_heads / tensor, config.num_query_groups / tensor
    d = config.kv_channels
    norm = FP32 if fp32_norms else BF16
    # With sequence parallelism each rank keeps its rows of what lies between the matrix products.
    query, keys = heads * d, groups * d
    attention = (BF16 + norm) * hidden / tensor  # residual stream, and the norm's input
    attention += BF16 * hidden / tensor  # normalised: input of the projections
    attention += BF16 * (query + 2 * keys)  # output of the projection, of which v stays
    if config.qk_layernorm:
        attention += norm * (query + keys)
    attention += BF16 * (query + keys)  # rotated q and k
    attention += BF16 * query + FP32 * heads  # output, LSE
    if is_msa:
        index = groups * index_head_dim(config)
        attention += (norm + BF16) * (index + index_head_dim(config))
        attention += 4 * (config.msa_num_selected_blocks + 1) * groups
    backward = BF16 * query + BF16 * (query + 2 * keys)  # gradients of the output, of q, k and v

    feed_forward = (BF16 + norm) * hidden / tensor + BF16 * hidden / tensor
    if is_moe:
        width, chosen = expert_ffn_size(config), config.moe_router_topk
        shared = config.moe_shared_expert_intermediate_size or 0
        rows = chosen / tensor  # of the routed experts, per token of the rank
        one_expert = BF16 * hidden + BF16 * (2 + 1) * width / layout.expert_tensor * layout.tensor
        feed_forward += rows * (one_expert + BF16 * hidden)  # permuted rows and the experts' output
        feed_forward += BF16 * (2 + 1) * shared / tensor
        feed_forward += FP32 * config.num_moe_experts * 2 / tensor  # router scores and probabilities
        experts_backward = rows * BF16 * (2 * hidden + 3 * width / layout.expert_tensor * layout.tensor)
    else:
        feed_forward += BF16 * (2 + 1) * config.ffn_hidden_size / tensor
        experts_backward = BF16 * 3 * config.ffn_hidden_size / tensor
    return LayerBytes(attention, feed_forward, backward, experts_backward)


def stage_memory(
    model: Model,
    layout: Layout,
    pipeline_rank: int,
    *,
    seq_length: int,
    microbatches: int,
    optimizer: OptimizerSettings,
    rates: KernelRates,
    fp32_norms: bool,
) -> Memory:
    """Memory of the ranks of one pipeline stage.

    Args:
        seq_length: tokens of a sequence, over all context-parallel ranks.
        microbatches: of a step, per replica.
        rates: its measured workspaces.
    """
    config = model.config
    weights = rank_weights(model, layout, pipeline_rank)
    replicas = layout.data * layout.context if optimizer.is_distributed else 1
    expert_replicas = layout.expert_data if optimizer.is_distributed else 1
    adam = 3 * FP32 * (weights.dense / replicas + weights.expert / expert_replicas)

    tokens = seq_length * layout.micro_batch / layout.context
    kinds = layer_kinds(config)
    per_layer = [
        layer_bytes(model, layout, is_moe=kind.is_moe, is_msa=kind.is_msa, fp32_norms=fp32_norms)
        for kind in kinds
    ]
    layers = layout.layers_of(pipeline_rank)
    checkpointed = BF16 * config.hidden_size / layout.tensor
    ids = 4 * (config.msa_num_selected_blocks + 1) * config.num_query_groups / layout.tensor
    kept, running, feed_forward = 0.0, 0.0, 0.0
    for layer in layers:
        each = per_layer[layer]
        if layout.recompute == "full":
            kept += checkpointed + ids
            running = max(running, each.attention + each.attention_backward)
            feed_forward = max(feed_forward, each.kept + each.feed_forward_backward)
        elif layout.recompute == "moe" and kinds[layer].is_moe:
            kept += each.attention + 3 * checkpointed  # residual, normalised input, output
            running = max(running, each.attention_backward)
            feed_forward = max(feed_forward, each.feed_forward + each.feed_forward_backward)
        else:
            kept += each.kept
            running = max(running, each.backward)
    in_flight = microbatches_in_flight(layout, pipeline_rank, microbatches)

    gathered = gathered_key_bytes(model, layout, seq_length) if layout.context > 1 else 0.0
    loss = 0.0
    if layout.holds_output(pipeline_rank):
        # bf16 logits and their fp32 copy, in which the loss works; in the backward pass the other way round.
        loss = (BF16 + FP32) * tokens * model.vocabulary / layout.tensor
    return Memory(
        weights=BF16 * weights.total,
        gradients=optimizer.gradient_bytes * weights.total,
        optimizer=adam,
        activations=kept * tokens * in_flight,
        layer=running * tokens,
        feed_forward=feed_forward * tokens,
        workspace=rates.workspace_bytes(tokens, heads=config.num_attention_heads // layout.tensor),
        gathered_keys=gathered,
        loss=loss,
    )


def gathered_key_bytes(model: Model, layout: Layout, seq_length: int) -> float:
    """Index keys, keys and values of all context-parallel ranks, and their gradients in fp32."""
    config = model.config
    elements = 2 * config.num_query_groups / layout.tensor * config.kv_channels + index_head_dim(config)
    return (BF16 + FP32) * elements * seq_length * layout.micro_batch


def microbatches_in_flight(layout: Layout, pipeline_rank: int, microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, as a share of all its layers.

    One forward, one backward; with virtual stages the interleaved schedule, which starts more of them.
    """
    behind = layout.pipeline - pipeline_rank - 1
    if layout.virtual == 1:
        return min(behind + 1, microbatches)
    chunks = 2 * behind + (layout.virtual - 1) * layout.pipeline + 1
    return min(chunks, microbatches * layout.virtual) / layout.virtual
