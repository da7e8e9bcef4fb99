"""Megatron's flags, one generated `msa` group, and every check that can be made before a process group starts."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from megatron_msa.checkpoint.inspection import check_checkpoint
from megatron_msa.config import MSATransformerConfig, msa_field_names
from megatron_msa.data.batch import BatchSettings
from megatron_msa.data.datasets import validate_data_paths
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size
from megatron_msa.training import megatron_fixes, no_gpu


def add_msa_arguments(parser: argparse.ArgumentParser, *, has_gpu: bool) -> argparse.ArgumentParser:
    """The `extra_args_provider` of Megatron's parser; sets defaults that fit the installation."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import ArgumentGroupFactory

    inherited = [name for name in TransformerConfig.__dataclass_fields__ if name not in msa_field_names()]
    ArgumentGroupFactory(MSATransformerConfig, exclude=inherited).build_group(parser, title="msa")
    group = parser.add_argument_group("msa run")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the resolved configuration, the parameter count and the phase schedule, and exit.",
    )
    group.add_argument(
        "--metrics-file",
        help="JSON lines, one per logged step, appended. Default: metrics.jsonl in --save, or in the "
        "current folder without --save.",
    )
    group.add_argument(
        "--log-line",
        choices=["megatron", "compact"],
        default="megatron",
        help="Console line of a logged step: Megatron's own with the MSA values added, or one short line.",
    )
    if not transformer_engine_present():
        parser.set_defaults(**megatron_fixes.argument_defaults_without_te())
    if not has_gpu:
        parser.set_defaults(**no_gpu.argument_defaults())
    return parser


def transformer_engine_present() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def parse_arguments(*, has_gpu: bool) -> argparse.Namespace:
    """Parse and check the command line; like Megatron's `parse_and_validate_args`, with our checks around it.

    Raises:
        ConfigError: a setting, data file or checkpoint that cannot be used.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    args = parse_args(lambda parser: add_msa_arguments(parser, has_gpu=has_gpu))
    _check_before_megatron(args, has_gpu=has_gpu)
    if args.use_checkpoint_args:
        from megatron.training.checkpointing import load_args_from_checkpoint

        load_args_from_checkpoint(args)
    # Attention is causal by construction and documents are separated by offsets; a dense mask is never needed.
    args.create_attention_mask_in_dataloader = False
    validate_args(args)
    _check_training_length(args)
    BatchSettings.from_args(args)
    if not args.mock_data:
        validate_data_paths(args)
    set_global_variables(args)
    return args


def model_config_from_args(args: argparse.Namespace) -> MSAModelConfig:
    """The model configuration that the flags describe."""
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args

    transformer = core_transformer_config_from_args(args, MSATransformerConfig)
    config = gpt_config_from_args(args, config=transformer, model_config_cls=MSAModelConfig)
    check_checkpoint(args, transformer, padded_vocab_size(config))
    return config


def _check_before_megatron(args: argparse.Namespace, *, has_gpu: bool) -> None:
    """Checks whose failure Megatron would report as a failed assertion, or not at all."""
    if args.transformer_impl == "transformer_engine" and not transformer_engine_present():
        raise ConfigError(
            "--transformer-impl transformer_engine, but Transformer Engine is not installed; install the "
            "extra (pip install 'megatron-msa[te]') or use --transformer-impl local"
        )
    if not has_gpu and args.distributed_backend != "gloo":
        raise ConfigError(
            f"--distributed-backend {args.distributed_backend} needs GPUs and this machine has none; leave the "
            "flag out or use gloo"
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size is {args.context_parallel_size}; MSA layers do not support context "
            "parallelism yet, use 1"
        )
    for flag, value, allowed in _unsupported(args):
        raise ConfigError(f"{flag} is {value}; MSA layers do not support it, use {allowed}")
    if args.num_attention_heads and args.group_query_attention:
        groups = args.num_query_groups
        if groups < 1 or args.num_attention_heads % groups:
            raise ConfigError(
                f"--num-attention-heads {args.num_attention_heads} is not divisible by --num-query-groups "
                f"{groups}; every GQA group needs the same number of query heads"
            )
    if args.seq_length and args.msa_block_size > 0 and args.seq_length % args.msa_block_size:
        raise ConfigError(
            f"--seq-length {args.seq_length} is not a multiple of --msa-block-size {args.msa_block_size}; use a "
            "sequence length of whole blocks"
        )


def _unsupported(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    wrong: list[tuple[str, Any, str]] = []
    if args.attention_dropout:
        wrong.append(("--attention-dropout", args.attention_dropout, "--attention-dropout 0"))
    if args.multi_latent_attention:
        wrong.append(("--multi-latent-attention", "set", "grouped-query attention"))
    if args.window_size is not None:
        wrong.append(("--window-size", args.window_size, "no attention window"))
    if args.softmax_type != "vanilla":
        wrong.append(("--softmax-type", args.softmax_type, "vanilla"))
    if args.position_embedding_type == "mrope":
        wrong.append(("--position-embedding-type", "mrope", "rope"))
    return wrong


def _check_training_length(args: argparse.Namespace) -> None:
    from megatron_msa.phases import PhaseSchedule

    schedule = PhaseSchedule.parse(args.msa_schedule)
    if args.skip_train:
        return
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    iterations = args.train_iters or samples // args.global_batch_size
    schedule.check_length(train_iters=iterations, train_tokens=samples * args.seq_length)


def exit_with(error: ConfigError, rank: int) -> None:
    """Report a `ConfigError` once and stop with status 2."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
