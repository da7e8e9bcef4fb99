"""A plan: memory, time and traffic of a training run under one layout, and the search for the best layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_msa.errors import ConfigError
from megatron_msa.phases import Phase
from megatron_msa.planning.cluster import Cluster
from megatron_msa.planning.layout import RECOMPUTE, Layout, check_candidate, equal_layers, split_layers
from megatron_msa.planning.memory import Memory, stage_memory
from megatron_msa.planning.rates import KernelRates
from megatron_msa.planning.request import Request
from megatron_msa.planning.step_time import StepEstimate, StepTime, Traffic
from megatron_msa.training.flops import StepFlops, causal_pairs, sparse_pairs, step_flops
from megatron_msa.training.parameter_count import layer_kinds

_FEWEST_TOKENS = 4096
"""Of a microbatch on a rank: no kernel has been measured below."""


@dataclass(frozen=True)
class Plan:
    """One layout of a run on a cluster.

    Attributes:
        memory: per pipeline rank.
        phase: that ``step``, ``flops`` and ``traffic`` are of: the longest of the run.
        days: of the whole run, all phases, without interruptions and saving.
    """

    request: Request
    cluster: Cluster
    layout: Layout
    memory: list[Memory]
    phase: Phase
    microbatches: int
    step: StepTime
    flops: StepFlops
    traffic: Traffic
    days: float

    @property
    def peak_gib(self) -> float:
        return max(memory.gib for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_gib + self.cluster.reserved_gib <= self.cluster.gpu.memory_gib

    @property
    def tokens_per_step(self) -> int:
        return self.request.global_batch * self.request.seq_length

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.tokens_per_step / self.step.total / self.cluster.gpus

    @property
    def mfu(self) -> float:
        """Of the executed FLOPs; recomputation does not count."""
        return self.flops.executed / (
            self.step.total * self.cluster.gpus * self.cluster.gpu.peak_tflops * 1e12
        )


def check_memory(plan: Plan) -> None:
    """Refuse a layout that does not fit.

    Raises:
        ConfigError: with the parts of the fullest rank.
    """
    if plan.fits:
        return
    rank = max(range(len(plan.memory)), key=lambda each: plan.memory[each].gib)
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in plan.memory[rank].in_gib().items() if value > 0.05
    )
    raise ConfigError(
        f"{plan.layout.describe()} needs {plan.peak_gib:.1f} GiB on pipeline rank {rank} ({parts}) and "
        f"{plan.cluster.reserved_gib:g} GiB beside, but the GPU has "
        f"{plan.cluster.gpu.memory_gib:g} GiB; divide further (--tensor-, --pipeline-, --context- or "
        "--expert-model-parallel-size) or recompute more"
    )


def make_plan(request: Request, layout: Layout, cluster: Cluster, rates: KernelRates) -> Plan:
    """Plan a run under a layout that divides; whether it fits in memory is for the caller to ask."""
    microbatches = request.microbatches(layout)
    tokens = request.phase_tokens()
    phase = max(tokens, key=lambda each: tokens[each])
    estimates = {each: _estimate(request, layout, cluster, rates, each) for each in {*tokens, phase}}
    steps = {each: estimate.step(microbatches) for each, estimate in estimates.items()}
    per_step = request.global_batch * request.seq_length
    seconds = sum(tokens[each] / per_step * steps[each].total for each in tokens)
    config = request.model.config
    flops = step_flops(
        config,
        padded_vocab_size=request.model.vocabulary,
        num_tokens=per_step,
        causal_pairs=request.global_batch * causal_pairs([request.seq_length]),
        sparse_pairs=request.global_batch
        * sparse_pairs([request.seq_length], config.msa_block_size, config.msa_num_selected_blocks),
        phase=phase,
    )
    memory = [
        stage_memory(
            request.model,
            layout,
            rank,
            seq_length=request.seq_length,
            microbatches=microbatches,
            optimizer=request.optimizer,
            rates=rates,
            fp32_norms=request.local_layers,
        )
        for rank in range(layout.pipeline)
    ]
    traffic = estimates[phase].traffic(microbatches)
    return Plan(
        request, cluster, layout, memory, phase, microbatches, steps[phase], flops, traffic, seconds / 86400
    )


def search(request: Request, cluster: Cluster, rates: KernelRates) -> list[Plan]:
    """Layouts that divide and fit, the fastest first.

    Raises:
        ConfigError: there is none; with the reason of the candidate that came closest.
    """
    plans = []
    smallest: Plan | None = None
    last: ConfigError | None = None
    for layout in candidates(request, cluster, rates):
        try:
            check_candidate(request.args, layout)
        except ConfigError as error:
            last = error
            continue
        plan = make_plan(request, layout, cluster, rates)
        if plan.fits:
            plans.append(plan)
        elif smallest is None or plan.peak_gib < smallest.peak_gib:
            smallest = plan
    if not plans and smallest is not None:
        check_memory(smallest)
    if not plans:
        raise ConfigError(f"no layout divides for {cluster.gpus} GPUs; the last one tried: {last}")
    return sorted(plans, key=lambda plan: plan.step.total)


def candidates(request: Request, cluster: Cluster, rates: KernelRates) -> Iterator[Layout]:
    """Layouts whose sizes are powers of two, with tensors inside a node, and micro batches of 1, 2 and 4.

    Those that do not divide are among them; `check_candidate` says so.
    """
    config = request.model.config
    world, node = cluster.gpus, cluster.gpus_per_node
    experts = config.num_moe_experts or 1
    tensors = [size for size in _powers(node) if size <= config.num_query_groups]
    contexts = [size for size in _powers(64) if request.seq_length // size >= _FEWEST_TOKENS]
    for tensor, pipeline, context, expert, micro_batch in itertools.product(
        tensors, _powers(min(16, config.num_layers)), contexts, _powers(min(experts, 64)), _powers(4)
    ):
        ranks = tensor * pipeline * context
        if world % ranks or world % (expert * pipeline):
            continue
        microbatches, rest = divmod(request.global_batch, micro_batch * (world // ranks))
        if rest or not microbatches:
            continue
        for virtual in (1, 2) if pipeline > 1 else (1,):
            if pipeline * virtual > config.num_layers or (virtual > 1 and microbatches % pipeline):
                continue
            layout = Layout(
                world=world,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                # Experts are narrow: cutting them further costs more than it saves.
                expert_tensor=1,
                micro_batch=micro_batch,
                chunks=(tuple(range(config.num_layers)),),
            )
            for recompute in RECOMPUTE if config.num_moe_experts else ("none", "full"):
                recomputed = replace(layout, recompute=recompute)
                splits = {_balanced(request, recomputed, cluster, rates, pipeline * virtual)}
                if virtual > 1:  # the dearest virtual stage as cheap as can be does not make the ranks equal
                    splits.add(equal_layers(config.num_layers, pipeline * virtual))
                for chunks in sorted(splits):
                    yield replace(recomputed, chunks=chunks)


def _balanced(
    request: Request, layout: Layout, cluster: Cluster, rates: KernelRates, stages: int
) -> tuple[tuple[int, ...], ...]:
    estimate = _estimate(request, layout, cluster, rates, Phase.SPARSE)
    costs = [estimate.layer(layer).total for layer in range(len(layer_kinds(request.model.config)))]
    return split_layers(costs, estimate.output_seconds(), stages)


def _estimate(
    request: Request, layout: Layout, cluster: Cluster, rates: KernelRates, phase: Phase
) -> StepEstimate:
    return StepEstimate(
        request.model,
        layout,
        cluster,
        rates,
        seq_length=request.seq_length,
        phase=phase,
        local_layers=request.local_layers,
        optimizer=request.optimizer,
    )


def _powers(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length()) if 2**exponent <= limit]
