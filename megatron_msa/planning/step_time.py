"""Seconds of one training step of a layout: kernels, matrix products, the rest, exposed communication.

Per microbatch and layer, then the dearest pipeline stage times the microbatches, and the pipeline's bubble.
No overlap is assumed beyond what Megatron's flags give: gradients and parameters travel beside one
microbatch, keys beside the selection and the output projection (docs/context_parallelism.md), everything else
is exposed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_msa.phases import Phase
from megatron_msa.planning.cluster import Cluster
from megatron_msa.planning.layout import Layout
from megatron_msa.planning.memory import BF16, FP32, OptimizerSettings
from megatron_msa.planning.rates import HEAD_DIM, HEADS, KernelRates
from megatron_msa.planning.weights import Model, rank_weights
from megatron_msa.training.flops import causal_pairs, sparse_pairs
from megatron_msa.training.parameter_count import (
    attention_matrix_size,
    expert_ffn_size,
    index_head_dim,
    index_matrix_size,
    layer_kinds,
    mlp_matrix_size,
    router_matrix_size,
    shared_expert_matrix_size,
)

_OPTIMIZER_BYTES = (
    30  # per parameter: gradient, two moments and master weight read, the latter and bf16 written
)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for one microbatch, forward and backward."""

    attention: float = 0.0
    """Selection, attention and KL."""
    products: float = 0.0
    """Matrix products with weights."""
    other: float = 0.0
    """Norms, rotary embedding, permutation, activation: bound by memory."""
    recomputed: float = 0.0
    """What the backward pass computes again."""
    host: float = 0.0
    """What is left of the time that the host needs to launch it all."""
    tensor_comm: float = 0.0
    expert_comm: float = 0.0
    context_comm: float = 0.0
    """Exposed."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: LayerTime) -> LayerTime:
        names = [field.name for field in fields(self)]
        return LayerTime(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        stage: of the dearest stage, one microbatch.
        output: output projection and loss of that stage, one microbatch.
        microbatches: per replica.
        bubble: time in which a stage waits for others.
        pipeline_comm: exposed transfers between stages.
        data_comm: exposed part of gradients and parameters.
        optimizer: Adam.
        host: what is left of the time that the host needs beside the layers: embedding, output and loss of
            all microbatches, launches of the data-parallel collectives, the optimizer.
    """

    stage: LayerTime
    output: float
    microbatches: int
    bubble: float
    pipeline_comm: float
    data_comm: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        busy = self.microbatches * (self.stage.total + self.output)
        return busy + self.bubble + self.pipeline_comm + self.data_comm + self.optimizer + self.host

    @property
    def waiting_for_host(self) -> float:
        """Seconds in which a GPU of the dearest stage has nothing to do but to wait for launches."""
        return self.microbatches * self.stage.host + self.host


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in a step."""

    tensor: float
    expert: float
    context: float
    pipeline: float
    data: float


class StepEstimate:
    """Times of a model on a cluster.

    Args:
        seq_length: tokens of a sequence, one document.
        local_layers: whether layers are Megatron's `local` ones, which the host launches expert by expert.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        cluster: Cluster,
        rates: KernelRates,
        *,
        seq_length: int,
        phase: Phase,
        local_layers: bool,
        optimizer: OptimizerSettings,
    ) -> None:
        self.model, self.layout, self.cluster, self.rates = model, layout, cluster, rates
        self.seq_length, self.phase, self.local_layers = seq_length, phase, local_layers
        self.optimizer = optimizer
        self.tokens = seq_length * layout.micro_batch / layout.context
        """Of a rank and microbatch, before tensor parallelism shares them."""
        self.kinds = layer_kinds(model.config)
        self._times = {kind: self._layer(*kind) for kind in set(self.kinds)}

    # -- one layer -------------------------------------------------------------------------------------

    def layer(self, index: int) -> LayerTime:
        """Of a decoder layer."""
        return self._times[self.kinds[index]]

    def _layer(self, is_moe: bool, is_msa: bool) -> LayerTime:
        layout = self.layout
        attention = self.attention_part(is_msa)
        feed_forward, expert_comm = self._feed_forward_products(is_moe)
        feed_forward_other = self._feed_forward_other(is_moe)
        recomputed = 0.0
        if layout.recompute == "full":
            products = attention.products + feed_forward + attention.other + feed_forward_other
            recomputed = self._attention(is_msa)[1] + products / 3 + expert_comm / 2
        elif layout.recompute == "moe" and is_moe:
            recomputed = (feed_forward + feed_forward_other) / 3 + expert_comm / 2
        device = attention + LayerTime(
            products=feed_forward,
            other=feed_forward_other,
            recomputed=recomputed,
            tensor_comm=self._tensor_comm(),
            expert_comm=expert_comm,
        )
        least = self._launch_seconds(is_moe)
        return device + LayerTime(host=max(0.0, least - device.total))

    def _launch_seconds(self, is_moe: bool) -> float:
        """That the host needs for a layer."""
        if self.local_layers:
            return self.rates.local_layer_s
        experts = (self.model.config.num_moe_experts or 0) // self.layout.expert if is_moe else 0
        return self.rates.host.layer(experts, self.layout.recompute)

    def attention_part(self, is_msa: bool) -> LayerTime:
        """The attention of a layer: projections, rotary embedding, kernels, and the exchange of keys."""
        config, layout, rates = self.model.config, self.layout, self.rates
        per_second = rates.matmul_tflops * 1e12
        kernels, _ = self._attention(is_msa)
        products = 6 * attention_matrix_size(config)
        if is_msa and self.phase.has_kl:
            products += 4 * index_matrix_size(config)  # their input is detached: no gradient of it
        width = config.num_attention_heads * config.kv_channels / (HEADS * HEAD_DIM)
        return LayerTime(
            attention=kernels,
            products=products / layout.tensor * self.tokens / per_second,
            other=rates.attention_other_us * 1e-6 * self.tokens / layout.tensor * width,
            context_comm=self._context_comm(kernels) if layout.context > 1 else 0.0,
        )

    def _attention(self, is_msa: bool) -> tuple[float, float]:
        """Seconds of attention kernels, forward and backward; and of a recomputed forward pass."""
        config, rates, n = self.model.config, self.rates, self.seq_length
        shared = self.layout.micro_batch / (self.layout.context * self.layout.tensor)
        heads, groups, d, d_i = (
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            index_head_dim(config),
        )
        causal = causal_pairs([n])
        main = 2 * d * heads
        if not is_msa or self.phase is Phase.DENSE:
            seconds = 7 * main * causal / (rates.dense_tflops.at(n) * 1e12) * shared
            return seconds, seconds * 2 / 7
        select = 2 * d_i * groups * causal
        kl = 3 * 2 * d_i * groups
        if self.phase is Phase.SPARSE:
            attended = sparse_pairs([n], config.msa_block_size, config.msa_num_selected_blocks)
            flops = select + (7 * main + kl) * attended
            seconds = rates.sparse_seconds(n, flops, select) * shared
            # Selections are replayed, not recomputed.
            again = (2 * main * attended) / (rates.forward_tflops.at(n) * 1e12) * shared
            return seconds, again
        seconds = (select + (7 * main + kl) * causal) / (rates.warmup_tflops * 1e12) * shared
        return seconds, seconds * 2 / 7

    def _feed_forward_products(self, is_moe: bool) -> tuple[float, float]:
        """Seconds of matrix products, and of the experts' all-to-all."""
        config, layout, rates = self.model.config, self.layout, self.rates
        per_second = rates.matmul_tflops * 1e12
        if not is_moe:
            size = mlp_matrix_size(config, config.ffn_hidden_size)
            return 6 * size / layout.tensor * self.tokens / per_second, 0.0
        shared = 6 * shared_expert_matrix_size(config) / layout.tensor * self.tokens
        router = 6 * router_matrix_size(config) / layout.tensor * self.tokens
        routed = 6 * mlp_matrix_size(config, expert_ffn_size(config)) * config.moe_router_topk
        routed *= self.tokens / layout.tensor
        seconds = (shared + router + routed / rates.assumptions.expert_efficiency) / per_second
        received = self._expert_bytes()
        rate = self.cluster.link_gb_per_s(layout.expert * layout.expert_tensor)
        return seconds, received / (rate * 1e9)

    def _expert_bytes(self) -> float:
        """Received by a rank per layer and microbatch: rows to the experts and back, and their gradients."""
        config, layout = self.model.config, self.layout
        rows = self.tokens / layout.tensor * config.moe_router_topk
        away = 1 - 1 / (layout.expert * layout.expert_tensor)
        return 4 * rows * config.hidden_size * BF16 * away

    def _feed_forward_other(self, is_moe: bool) -> float:
        """Memory traffic, forward and backward: norm and residual, permutation, activation."""
        config, layout = self.model.config, self.layout
        hidden = config.hidden_size
        traffic = 44.0 * hidden
        if is_moe:
            chosen, width = config.moe_router_topk, expert_ffn_size(config)
            traffic += (12 * chosen + 4) * hidden + 16 * chosen * width
            traffic += 16 * (config.moe_shared_expert_intermediate_size or 0)
        else:
            traffic += 16 * config.ffn_hidden_size
        per_second = self.cluster.gpu.memory_tb_per_s * 1e12 * self.rates.assumptions.memory_efficiency
        return traffic * self.tokens / layout.tensor / per_second

    def _tensor_comm(self) -> float:
        layout = self.layout
        rate = self.cluster.link_gb_per_s(layout.tensor) * 1e9
        return self._tensor_bytes() / rate

    def _tensor_bytes(self) -> float:
        """Per layer and microbatch: attention gathers and scatters the sequence, and gathers it once more for
        the gradients of its weights. Experts exchange rows instead."""
        layout = self.layout
        if layout.tensor == 1:
            return 0.0
        away = 1 - 1 / layout.tensor
        return 5 * 2 * self.tokens * self.model.config.hidden_size * BF16 * away

    def _context_comm(self, kernels: float) -> float:
        """Exposed, as in tools/context_parallel_tables.py."""
        config, layout = self.model.config, self.layout
        rate = self.cluster.link_gb_per_s(layout.tensor * layout.context) * 1e9
        index, keys = (size / rate for size in self._key_bytes())
        select = 2 * index_head_dim(config) * config.num_query_groups / layout.tensor
        select *= causal_pairs([self.seq_length]) * layout.micro_batch / layout.context
        beside_forward = min(select / (self.rates.select_tflops * 1e12), kernels)
        projection = 4 * config.num_attention_heads * config.kv_channels * config.hidden_size / layout.tensor
        beside_backward = projection * self.tokens / (self.rates.matmul_tflops * 1e12)
        gradients = 2 * (index + keys)
        passes = 2 if layout.recompute == "full" else 1  # forward, and once more when it is recomputed
        forward = passes * (index + max(0.0, keys - beside_forward))
        return forward + max(0.0, index + keys - beside_backward) + gradients

    def _key_bytes(self) -> tuple[float, float]:
        """Received of index keys, and of keys and values, per layer and microbatch."""
        config, layout = self.model.config, self.layout
        tokens = self.seq_length * layout.micro_batch * (1 - 1 / layout.context)
        groups = config.num_query_groups / layout.tensor
        return BF16 * index_head_dim(config) * tokens, 2 * BF16 * config.kv_channels * groups * tokens

    # -- the step --------------------------------------------------------------------------------------

    def output_seconds(self) -> float:
        """Output projection and loss of one microbatch, forward and backward."""
        size = self.model.vocabulary * self.model.config.hidden_size / self.layout.tensor
        per_second = self.rates.matmul_tflops * 1e12 * self.rates.assumptions.output_efficiency
        return 6 * size * self.tokens / per_second

    def step(self, microbatches: int) -> StepTime:
        """A step of that many microbatches per replica."""
        layout = self.layout
        stages = []
        for rank in range(layout.pipeline):
            time = sum((self.layer(layer) for layer in layout.layers_of(rank)), LayerTime())
            output = self.output_seconds() if layout.holds_output(rank) else 0.0
            stages.append((time.total + output, time, output))
        rank = max(range(layout.pipeline), key=lambda each: stages[each][0])
        longest, stage, output = stages[rank]
        transfers = 2 * self._boundary_bytes() / (self.cluster.network_gb_per_s * 1e9)
        data, optimizer = max(
            (self._data_comm(each, longest), self._optimizer(each)) for each in range(layout.pipeline)
        )
        return StepTime(
            stage=stage,
            output=output,
            microbatches=microbatches,
            bubble=(layout.pipeline - 1) / layout.virtual * longest,
            pipeline_comm=microbatches * transfers * layout.virtual if layout.pipeline > 1 else 0.0,
            data_comm=data,
            optimizer=optimizer,
            host=self._host_beside_layers(rank, microbatches, output, optimizer),
        )

    def _host_beside_layers(self, rank: int, microbatches: int, output: float, optimizer: float) -> float:
        """What is left of the host's time for the rest of a step."""
        if self.local_layers:
            return 0.0
        host, layers = self.rates.host, self.layout.layers_of(rank)
        ends = max(0.0, host.ends - output) if self.layout.holds_output(rank) else 0.0
        # Launched while a microbatch is computed: hidden as far as its layers keep the GPU busy for longer.
        idle = sum(self.layer(each).total - self._launch_seconds(self.kinds[each].is_moe) for each in layers)
        buckets = max(0.0, host.buckets * len(layers) - idle)
        return microbatches * ends + buckets + max(0.0, host.optimizer * len(layers) - optimizer)

    def traffic(self, microbatches: int) -> Traffic:
        """Bytes that a rank of the stage with the most layers receives."""
        layout = self.layout
        rank = max(range(layout.pipeline), key=lambda each: len(layout.layers_of(each)))
        layers = layout.layers_of(rank)
        passes = 2 if layout.recompute == "full" else 1
        exchange = sum(self._key_bytes())
        context = exchange * (1 + passes + 2) if layout.context > 1 else 0.0
        experts = sum(self.kinds[layer].is_moe for layer in layers) * self._expert_bytes()
        return Traffic(
            tensor=microbatches * len(layers) * self._tensor_bytes(),
            expert=microbatches * experts * (1.0 if layout.recompute == "none" else 1.5),
            context=microbatches * len(layers) * context,
            pipeline=microbatches * 2 * self._boundary_bytes() * layout.virtual
            if layout.pipeline > 1
            else 0.0,
            data=sum(self._data_bytes(rank)),
        )

    def _boundary_bytes(self) -> float:
        return self.tokens / self.layout.tensor * self.model.config.hidden_size * BF16

    def _data_bytes(self, rank: int) -> tuple[float, float]:
        """Gradients and parameters of the dense part and of the experts."""
        layout = self.layout
        weights = rank_weights(self.model, layout, rank)
        both = self.optimizer.gradient_bytes + (BF16 if self.optimizer.is_distributed else FP32)
        replicas = layout.data * layout.context
        return (
            both * weights.dense * (1 - 1 / replicas),
            both * weights.expert * (1 - 1 / layout.expert_data),
        )

    def _data_comm(self, rank: int, microbatch: float) -> float:
        layout = self.layout
        span = layout.world // layout.pipeline
        seconds = sum(self._data_bytes(rank)) / (self.cluster.link_gb_per_s(span) * 1e9)
        return max(0.0, seconds - microbatch)

    def _optimizer(self, rank: int) -> float:
        layout = self.layout
        weights = rank_weights(self.model, layout, rank)
        replicas = layout.data * layout.context if self.optimizer.is_distributed else 1
        expert_replicas = layout.expert_data if self.optimizer.is_distributed else 1
        mine = weights.dense / replicas + weights.expert / expert_replicas
        rate = self.cluster.gpu.memory_tb_per_s * 1e12 * self.rates.assumptions.memory_efficiency
        return mine * _OPTIMIZER_BYTES / rate
