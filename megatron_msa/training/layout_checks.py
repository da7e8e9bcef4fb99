"""Whether the model, the batch and the processes divide as the parallel layout needs, before Megatron looks.

Megatron states these conditions in assertions without the numbers, while it builds the model or in the first
step; some only when all processes have met.
"""

from __future__ import annotations

import argparse
import math

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_msa.attention.context_parallel import check_length
from megatron_msa.data.batch import check_packed_microbatches
from megatron_msa.errors import ConfigError


def check_layout(args: argparse.Namespace) -> None:
    """Check parsed arguments that Megatron has not completed yet; what is not given is not checked.

    Raises:
        ConfigError: names the flags, their values and what would do.
    """
    _check_sizes(args)
    _check_tensor_parallel(args)
    _check_experts(args)
    _check_stages(args)
    _check_sequence(args)
    _check_processes(args)
    _check_batch(args)


def _check_sizes(args: argparse.Namespace) -> None:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {size}; it must be at least 1")


def _check_tensor_parallel(args: argparse.Namespace) -> None:
    size = args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else None
    if groups and size > groups:
        raise ConfigError(
            f"--tensor-model-parallel-size is {size} but there are {groups} GQA groups (--num-query-groups); "
            f"MSA shards its index heads with the groups, so use at most {groups}"
        )
    for name, value in (
        ("num_query_groups", groups),
        ("num_attention_heads", args.num_attention_heads),
        ("ffn_hidden_size", args.ffn_hidden_size),
        ("moe_shared_expert_intermediate_size", args.moe_shared_expert_intermediate_size),
    ):
        _check_divides(name, value, "tensor_model_parallel_size", size)
    if size > 1 and args.num_experts and not args.sequence_parallel:
        raise ConfigError(
            f"--num-experts {args.num_experts} with --tensor-model-parallel-size {size} needs "
            "--sequence-parallel: Megatron trains experts under tensor parallelism only with it; add the flag"
        )


def _check_experts(args: argparse.Namespace) -> None:
    size = args.expert_model_parallel_size
    if size > 1 and not args.num_experts:
        raise ConfigError(
            f"--expert-model-parallel-size is {size} but the model has no experts; set --num-experts, or "
            "leave it out"
        )
    if args.num_experts:
        _check_divides("num_experts", args.num_experts, "expert_model_parallel_size", size)
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        name = "moe_ffn_hidden_size" if args.moe_ffn_hidden_size else "ffn_hidden_size"
        _check_divides(name, width, "expert_tensor_parallel_size", _expert_tensor_parallel(args))


def _check_stages(args: argparse.Namespace) -> None:
    if args.pipeline_model_parallel_layout or not args.num_layers:
        return  # which says itself what each stage holds
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if uneven or args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split:
        return
    stages = args.pipeline_model_parallel_size
    _check_divides("num_layers", args.num_layers, "pipeline_model_parallel_size", stages)
    virtual = args.num_virtual_stages_per_pipeline_rank
    if virtual and args.num_layers // stages % virtual:
        raise ConfigError(
            f"--num-layers {args.num_layers} over --pipeline-model-parallel-size {stages} leaves "
            f"{args.num_layers // stages} layers to a rank, which --num-virtual-stages-per-pipeline-rank "
            f"{virtual} does not divide"
        )


def _check_sequence(args: argparse.Namespace) -> None:
    ranks, context = args.tensor_model_parallel_size, args.context_parallel_size
    if not args.seq_length:
        return
    if context > 1:
        check_length(args.seq_length, context)
    if args.sequence_parallel and args.seq_length // context % ranks:
        step = math.lcm(ranks * context, 2 * context if context > 1 else 1)
        raise ConfigError(
            f"--sequence-parallel shares the {args.seq_length // context} tokens of a context-parallel rank "
            f"(--seq-length {args.seq_length} / --context-parallel-size {context}) between the {ranks} ranks "
            f"of --tensor-model-parallel-size; use a --seq-length that is a multiple of {step}"
        )


def _check_processes(args: argparse.Namespace) -> None:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context, expert = args.context_parallel_size, args.expert_model_parallel_size
    if args.world_size % (tensor * pipeline * context):
        raise ConfigError(
            f"{args.world_size} processes cannot be shared out: --tensor-model-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {pipeline} x --context-parallel-size {context} = "
            f"{tensor * pipeline * context} ranks hold one copy of the model, and the processes must be a "
            "multiple of that"
        )
    expert_tensor = _expert_tensor_parallel(args)
    if args.num_experts and args.world_size % (expert_tensor * expert * pipeline):
        raise ConfigError(
            f"{args.world_size} processes cannot be shared out: --expert-tensor-parallel-size {expert_tensor}"
            f" (by default --tensor-model-parallel-size) x --expert-model-parallel-size {expert} x "
            f"--pipeline-model-parallel-size {pipeline} = {expert_tensor * expert * pipeline} ranks hold one "
            "copy of the experts, and the processes must be a multiple of that"
        )


def _check_batch(args: argparse.Namespace) -> None:
    if not args.global_batch_size or not args.micro_batch_size:
        return
    stages = args.pipeline_model_parallel_size
    model_ranks = args.tensor_model_parallel_size * stages * args.context_parallel_size
    replicas = args.world_size // model_ranks
    if args.dataloader_inter_document_masking:
        check_packed_microbatches(stages, args.micro_batch_size)
    if args.global_batch_size % (args.micro_batch_size * replicas):
        if args.decrease_batch_size_if_needed:
            return
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size} is not divisible by --micro-batch-size "
            f"{args.micro_batch_size} times {replicas} data-parallel ranks"
        )
    microbatches = args.global_batch_size // (args.micro_batch_size * replicas)
    group = args.microbatch_group_size_per_vp_stage or stages
    if _is_interleaved(args) and (microbatches < group or 0 < microbatches % group < stages):
        raise ConfigError(
            f"virtual pipeline stages take the {microbatches} microbatches of a step (--global-batch-size "
            f"{args.global_batch_size} / --micro-batch-size {args.micro_batch_size} / {replicas} data-"
            f"parallel ranks) in groups of {group}, and the last group of {microbatches % group} is too "
            f"small for --pipeline-model-parallel-size {stages}; use a multiple of {group} microbatches"
        )


def _is_interleaved(args: argparse.Namespace) -> bool:
    """Whether a pipeline rank holds several virtual stages."""
    stages = args.pipeline_model_parallel_size
    if stages == 1:
        return False
    if args.pipeline_model_parallel_layout:
        parse = PipelineParallelLayerLayout.get_num_stages_from_str
        return bool(parse(args.pipeline_model_parallel_layout) > stages)
    return bool(args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage)


def _expert_tensor_parallel(args: argparse.Namespace) -> int:
    return args.expert_tensor_parallel_size or args.tensor_model_parallel_size


def _check_divides(name: str, value: int | None, size_name: str, size: int) -> None:
    if value and value % size:
        flag, size_flag = (f"--{each.replace('_', '-')}" for each in (name, size_name))
        raise ConfigError(f"{flag} {value} is not divisible by {size_flag} {size}; change one of them")
