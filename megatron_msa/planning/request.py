"""What is to be planned, from the flags of a training command."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_msa.errors import ConfigError
from megatron_msa.phases import Phase, PhaseSchedule
from megatron_msa.planning.layout import Layout, layout_from_args
from megatron_msa.planning.memory import OptimizerSettings
from megatron_msa.planning.weights import Model, check_plannable


@dataclass(frozen=True)
class Request:
    """A training run.

    Attributes:
        args: as Megatron's parser leaves them.
        model: what is trained.
        seq_length: tokens of a sequence.
        global_batch: sequences of a step.
        iterations: of the run; 0 if the command does not say.
        schedule: the phases.
        optimizer: how it keeps its state.
        local_layers: without Transformer Engine.
    """

    args: argparse.Namespace
    model: Model
    seq_length: int
    global_batch: int
    iterations: int
    schedule: PhaseSchedule
    optimizer: OptimizerSettings
    local_layers: bool

    def layout(self) -> Layout:
        """That of the command.

        Raises:
            ConfigError: it cannot work.
        """
        return layout_from_args(self.args)

    def microbatches(self, layout: Layout) -> int:
        """Of a step, per replica."""
        return self.global_batch // (layout.micro_batch * layout.data)

    def phase_tokens(self) -> dict[Phase, int]:
        """Tokens of the run in each phase."""
        total = self.iterations * self.global_batch * self.seq_length
        scale = 1 if self.schedule.unit == "tokens" else self.global_batch * self.seq_length
        ends = [*(start * scale for start in self.schedule.starts[1:]), total]
        tokens: dict[Phase, int] = {}
        for phase, start, end in zip(self.schedule.phases, self.schedule.starts, ends, strict=True):
            tokens[phase] = tokens.get(phase, 0) + max(0, min(end, total) - start * scale)
        return tokens


def read_command(flags: Sequence[str], world: int, *, with_layout: bool = True) -> Request:
    """Parse the flags of pretrain_msa.py for a number of processes; data and tokenizer are not touched.

    Args:
        flags: of the command.
        world: number of processes.
        with_layout: False to leave aside what the command says of the layout, for a search.

    Raises:
        ConfigError: a flag that cannot be used, or a layout that cannot work.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from megatron_msa.config import MSATransformerConfig
    from megatron_msa.training.arguments import add_msa_arguments, megatron_refusals

    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # it prints every layout that it parses
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = ["pretrain_msa.py", *flags]
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world)}
    try:
        with megatron_refusals(), contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(lambda parser: add_msa_arguments(parser, has_gpu=True))
            _check_given(args, with_layout=with_layout)
            if not with_layout:
                _forget_layout(args)
            complete = copy.deepcopy(args)
            if with_layout:
                layout_from_args(args)  # its reasons are better than Megatron's
            else:
                complete.world_size = 1  # on which every batch divides
            _without_transformer_engine(complete)
            validate_args(complete)
            config = core_transformer_config_from_args(complete, MSATransformerConfig)
            check_plannable(config)
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    vocabulary = args.padded_vocab_size or calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    samples = args.train_samples or (args.train_iters or 0) * complete.global_batch_size
    return Request(
        args=args,
        model=Model(config, vocabulary, bool(args.untie_embeddings_and_output_weights)),
        seq_length=args.seq_length,
        global_batch=complete.global_batch_size,
        iterations=samples // complete.global_batch_size,
        schedule=PhaseSchedule.parse(args.msa_schedule),
        optimizer=OptimizerSettings(
            is_distributed=args.use_distributed_optimizer,
            gradient_bytes=2 if args.grad_reduce_in_bf16 else 4,
        ),
        local_layers=args.transformer_impl == "local",
    )


def _forget_layout(args: argparse.Namespace) -> None:
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    args.context_parallel_size = args.expert_model_parallel_size = args.micro_batch_size = 1
    args.expert_tensor_parallel_size = args.pipeline_model_parallel_layout = None
    args.num_virtual_stages_per_pipeline_rank = args.recompute_granularity = args.recompute_modules = None
    args.sequence_parallel = False


def _check_given(args: argparse.Namespace, *, with_layout: bool) -> None:
    if not args.bf16:
        raise ConfigError("--bf16 is not set; a plan counts bytes and rates of bf16 only, add it")
    for flag, value in (
        ("--use-precision-aware-optimizer", args.use_precision_aware_optimizer),
        ("--optimizer-cpu-offload", args.optimizer_cpu_offload),
        ("--fp8-format", args.fp8),
        ("--use-megatron-fsdp", args.use_megatron_fsdp),
    ):
        if value:
            raise ConfigError(f"{flag} is {value}; a plan does not know its memory and rates, leave it out")
    if args.optimizer != "adam":
        raise ConfigError(f"--optimizer is {args.optimizer}; a plan knows the memory of adam only")
    exchanges = args.num_experts and (args.expert_model_parallel_size > 1 or not with_layout)
    if exchanges and args.moe_token_dispatcher_type == "allgather":
        raise ConfigError(
            "--moe-token-dispatcher-type is allgather, Megatron's default; a plan knows what alltoall sends, "
            "which is less: use alltoall"
        )
    if not (args.vocab_size or args.padded_vocab_size):
        raise ConfigError(
            "neither --vocab-size nor --padded-vocab-size is set; a plan loads no tokenizer, add one of them"
        )


def _without_transformer_engine(args: argparse.Namespace) -> None:
    """A machine that plans has no Transformer Engine: sizes are the same without it."""
    args.transformer_impl = "local"
    args.moe_grouped_gemm = args.moe_permute_fusion = args.moe_router_fusion = False
    args.cross_entropy_loss_fusion = args.gradient_accumulation_fusion = False
    args.apply_rope_fusion = args.masked_softmax_fusion = False
    args.no_persist_layer_norm = True
