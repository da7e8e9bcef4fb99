"""A parallel layout as Megatron's flags describe it, and who of its ranks holds which layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_msa.errors import ConfigError
from megatron_msa.training.layout_checks import check_layout

RECOMPUTE = ("none", "moe", "full")
"""What the backward pass computes again: nothing, the expert layers, or whole layers."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the groups, and the layers of each pipeline stage.

    Attributes:
        chunks: layers of each (virtual) stage in order; stage i lies on pipeline rank i % ``pipeline``. The
            first also holds the embedding, the last one the output projection and the loss.
        recompute: one of `RECOMPUTE`.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    micro_batch: int = 1
    chunks: tuple[tuple[int, ...], ...]
    recompute: str = "none"

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def virtual(self) -> int:
        """Virtual stages of a pipeline rank."""
        return len(self.chunks) // self.pipeline

    def layers_of(self, rank: int) -> list[int]:
        """Layers on a pipeline rank."""
        return [layer for chunk in self.chunks[rank :: self.pipeline] for layer in chunk]

    def holds_embedding(self, rank: int) -> bool:
        return rank == 0

    def holds_output(self, rank: int) -> bool:
        return rank == (len(self.chunks) - 1) % self.pipeline

    def flags(self) -> list[str]:
        """The flags of Megatron that describe it."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--context-parallel-size": self.context,
            "--expert-model-parallel-size": self.expert,
            "--expert-tensor-parallel-size": self.expert_tensor,
            "--micro-batch-size": self.micro_batch,
        }
        flags = [text for flag, size in sizes.items() for text in (flag, str(size))]
        if self.tensor > 1:
            flags.append("--sequence-parallel")
        if self.pipeline > 1:
            flags += ["--pipeline-model-parallel-layout", stages_text(self.chunks)]
        if self.recompute == "moe":
            flags += ["--recompute-granularity", "selective", "--recompute-modules", "moe"]
        if self.recompute == "full":
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            flags += ["--recompute-num-layers", "1"]
        return flags

    def describe(self) -> str:
        """In one short line."""
        parts = [
            f"TP{self.tensor}",
            f"PP{self.pipeline}" + (f"x{self.virtual}" if self.virtual > 1 else ""),
            f"CP{self.context}",
            f"EP{self.expert}",
            f"DP{self.data}",
        ]
        if self.micro_batch > 1:
            parts.append(f"micro batch {self.micro_batch}")
        return " ".join(parts) + f", recompute {self.recompute}"


def stages_text(chunks: Sequence[Sequence[int]]) -> str:
    """For --pipeline-model-parallel-layout: ``Et*11|t*11|t*11|t*8L``."""
    parts = [f"t*{len(chunk)}" if chunk else "" for chunk in chunks]
    parts[0], parts[-1] = "E" + parts[0], parts[-1] + "L"
    return "|".join(parts)


def split_layers(costs: Sequence[float], output_cost: float, stages: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive layers per stage so that the dearest stage is as cheap as can be.

    Args:
        costs: of each layer.
        output_cost: of the output projection and the loss, which the last stage has besides.
        stages: at most the number of layers.
    """
    low, high = max([*costs, output_cost]), sum(costs) + output_cost
    for _ in range(50):
        limit = (low + high) / 2
        if len(_fill(costs, output_cost, limit)) <= stages:
            high = limit
        else:
            low = limit
    chunks = _fill(costs, output_cost, high * (1 + 1e-9))  # or a sum in another order does not fit
    chunks = [[] for _ in range(stages - len(chunks))] + chunks
    # Stages without a layer: take one from the stage behind, from the front on.
    for i in range(stages - 1):
        if not chunks[i]:
            donor = next(j for j in range(i + 1, stages) if len(chunks[j]) > 0)
            chunks[i] = [chunks[donor].pop(0)]
    return tuple(tuple(chunk) for chunk in chunks)


def equal_layers(layers: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive layers per stage, as many on each; what is left over goes to the first ones."""
    each, left = divmod(layers, stages)
    starts = [stage * each + min(stage, left) for stage in range(stages + 1)]
    return tuple(tuple(range(start, end)) for start, end in pairwise(starts))


def _fill(costs: Sequence[float], output_cost: float, limit: float) -> list[list[int]]:
    """From the last stage on, each as full as the limit allows."""
    chunks: list[list[int]] = [[]]
    used = output_cost
    for layer in reversed(range(len(costs))):
        if used + costs[layer] > limit:
            chunks.insert(0, [])
            used = 0.0
        chunks[0].insert(0, layer)
        used += costs[layer]
    return chunks


def layout_from_args(args: argparse.Namespace) -> Layout:
    """The layout of a command.

    Args:
        args: parsed by Megatron, not yet completed.

    Raises:
        ConfigError: it cannot work; `check_layout` says why.
    """
    check_layout(args)
    for flag, value in (
        ("--num-layers-per-virtual-pipeline-stage", args.num_layers_per_virtual_pipeline_stage),
        ("--decoder-first-pipeline-num-layers", args.decoder_first_pipeline_num_layers),
        ("--decoder-last-pipeline-num-layers", args.decoder_last_pipeline_num_layers),
        ("--account-for-embedding-in-pipeline-split", args.account_for_embedding_in_pipeline_split),
        ("--account-for-loss-in-pipeline-split", args.account_for_loss_in_pipeline_split),
    ):
        if value:
            raise ConfigError(
                f"{flag} is {value}; a plan takes the layers of each stage from "
                "--pipeline-model-parallel-layout (such as 'Et*10|t*11|t*11|t*9L') or cuts them equally, use "
                "one of these"
            )
    pipeline = args.pipeline_model_parallel_size
    virtual = args.num_virtual_stages_per_pipeline_rank or 1
    if args.pipeline_model_parallel_layout:
        counts = _counts(args.pipeline_model_parallel_layout, pipeline)
        if sum(counts) != args.num_layers:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} holds {sum(counts)} "
                f"layers, but --num-layers is {args.num_layers}"
            )
    else:
        stages = pipeline * virtual
        counts = [args.num_layers // stages] * stages
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return Layout(
        world=args.world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=pipeline,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        micro_batch=args.micro_batch_size,
        chunks=tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True)),
        recompute=_recompute(args),
    )


def _counts(text: str, pipeline: int) -> list[int]:
    """Decoder layers of each stage, by Megatron's own parser."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    parsed = PipelineParallelLayerLayout.from_str(text, pipeline).layout  # [rank][virtual stage]
    virtual = len(parsed[0])
    return [
        parsed[rank][stage].count(LayerType.decoder) for stage in range(virtual) for rank in range(pipeline)
    ]


def _recompute(args: argparse.Namespace) -> str:
    if args.recompute_granularity is None:
        return "none"
    if args.recompute_granularity == "full":
        if args.recompute_method != "uniform" or args.recompute_num_layers != 1:
            raise ConfigError(
                f"--recompute-method is {args.recompute_method} and --recompute-num-layers "
                f"{args.recompute_num_layers}; a plan knows full recomputation of every layer on its own: "
                "use uniform and 1"
            )
        return "full"
    modules = args.recompute_modules or ["core_attn"]
    if modules != ["moe"]:
        raise ConfigError(
            f"--recompute-modules is {' '.join(modules)}; a plan knows `moe` (and full recomputation). "
            "Sparse attention keeps no scores: recomputing `core_attn` saves its output only"
        )
    return "moe"


def check_candidate(args: argparse.Namespace, layout: Layout) -> None:
    """Refuse a layout with the reason that training would give.

    Raises:
        ConfigError: see `check_layout`.
    """
    candidate = argparse.Namespace(**vars(args))
    candidate.world_size = layout.world
    candidate.tensor_model_parallel_size = layout.tensor
    candidate.pipeline_model_parallel_size = layout.pipeline
    candidate.context_parallel_size = layout.context
    candidate.expert_model_parallel_size = layout.expert
    candidate.expert_tensor_parallel_size = layout.expert_tensor
    candidate.micro_batch_size = layout.micro_batch
    candidate.sequence_parallel = layout.tensor > 1
    candidate.num_virtual_stages_per_pipeline_rank = layout.virtual if layout.virtual > 1 else None
    candidate.pipeline_model_parallel_layout = stages_text(layout.chunks) if layout.pipeline > 1 else None
    check_layout(candidate)
