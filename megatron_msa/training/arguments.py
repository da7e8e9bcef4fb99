"""Megatron's flags and a generated `msa` group: parsed, checked, resolved before a process group starts."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from megatron_msa.attention import index_initialization
from megatron_msa.attention.layer_specs import msa_layer_specs
from megatron_msa.checkpoint.inspection import check_checkpoint
from megatron_msa.config import MSATransformerConfig, msa_field_names
from megatron_msa.data.datasets import validate_data_paths
from megatron_msa.data.metadata import load_tokenizer, tokenizer_config_from_args, tokenizer_fingerprint
from megatron_msa.data.multimodal.checks import prepare_args
from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size, rotary_dims
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.training import argument_checks, megatron_fixes, no_gpu

_NO_EVALUATION_INTERVAL = 10**12


def add_msa_arguments(parser: argparse.ArgumentParser, *, has_gpu: bool) -> argparse.ArgumentParser:
    """The `extra_args_provider` of Megatron's parser; sets defaults that fit the installation."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import ArgumentGroupFactory

    inherited = [name for name in TransformerConfig.__dataclass_fields__ if name not in msa_field_names()]
    ArgumentGroupFactory(MSATransformerConfig, exclude=inherited).build_group(parser, title="msa")
    ArgumentGroupFactory(VisionConfig).build_group(parser, title="vision encoder")
    ArgumentGroupFactory(MultimodalDataConfig).build_group(parser, title="multimodal data")
    group = parser.add_argument_group("msa run")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the resolved configuration, the parameter count and the phase schedule, and exit.",
    )
    group.add_argument(
        "--eval-at-start",
        action="store_true",
        help="Validate once before the first step of a fresh run, so that its curve has a start.",
    )
    group.add_argument(
        "--msa-init-index",
        nargs="?",
        const=index_initialization.DEFAULT_METHOD,
        choices=index_initialization.METHODS,
        help="Continue from a dense (GQA) checkpoint: initialise the index branches that it lacks, at "
        "random, with the mean query head of each group and the mean key head, or with the best low-rank "
        f"approximation of the groups' scores. Without a value: {index_initialization.DEFAULT_METHOD}. Index "
        "branches that it has are loaded as they are.",
    )
    group.add_argument(
        "--keep-newest-checkpoints",
        type=int,
        default=1,
        metavar="K",
        help="With --save-retain-interval: leave the newest K checkpoints, should one of them be damaged. "
        "Megatron leaves one, besides those of the interval.",
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
    group.add_argument(
        "--log-encoder-time",
        action="store_true",
        help="With --vision-mode: measure the vision encoder's forward and backward pass in every step "
        "(encoder_seconds in the metrics).",
    )
    # NVIDIA's internal tracker: Megatron asks for it by default, and warns where it is not installed.
    parser.set_defaults(enable_one_logger=argument_checks.is_installed("one_logger"))
    parser.set_defaults(**megatron_fixes.argument_defaults(has_gpu=has_gpu))
    if not has_gpu:
        parser.set_defaults(**no_gpu.argument_defaults())
    megatron_fixes.repair_help(parser)
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print 500 lines of usage first
    return parser


def parse_arguments(*, has_gpu: bool) -> argparse.Namespace:
    """Parse and check the command line; like Megatron's `parse_and_validate_args`, with our checks around it.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    if any(argument.split("=")[0] == "--yaml-cfg" for argument in sys.argv[1:]):
        raise ConfigError("--yaml-cfg is set, which replaces all flags; pass the settings as flags instead")
    with megatron_refusals():
        args = parse_args(lambda parser: add_msa_arguments(parser, has_gpu=has_gpu))
        # In a dry run Megatron's list of all arguments goes to stderr: stdout is for the report.
        with contextlib.redirect_stdout(sys.stderr if args.dry_run else sys.stdout):
            if args.use_checkpoint_args:
                load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
                load_args_from_checkpoint(args)
            argument_checks.check_flags(args, has_gpu=has_gpu)
            # Attention is causal by construction and documents are separated by offsets: no dense mask.
            args.create_attention_mask_in_dataloader = False
            prepare_args(args)
            validate_args(args)
    argument_checks.check_training(args)
    if not args.eval_interval:
        # "If not set, evaluation will not run during training", but 0.19.2 divides by it all the same.
        args.eval_interval = _NO_EVALUATION_INTERVAL
    return args


def tokenizer_from_args(args: argparse.Namespace) -> Any:
    """Build the tokenizer, check the data against it, and complete ``args.padded_vocab_size``.

    ``args.tokenizer_fingerprint`` is set: checkpoints keep it, so that inference knows the tokenizer again.

    Raises:
        ConfigError: a tokenizer or dataset that cannot be used.
    """
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    tokenizer = load_tokenizer(tokenizer_config_from_args(args))
    args.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    validate_data_paths(args, tokenizer)
    if args.padded_vocab_size is None and args.pad_vocab_size:
        args.padded_vocab_size = calculate_padded_vocab_size(
            tokenizer.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            logging_enabled=False,
        )
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"--padded-vocab-size is {args.padded_vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
            "ids; leave the flag out"
        )
    return tokenizer


def model_config_from_args(args: argparse.Namespace) -> MSAModelConfig:
    """The model configuration that the flags describe; the checkpoint to be loaded must fit it.

    Raises:
        ConfigError: a configuration that cannot be built, or a checkpoint that does not fit.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    with megatron_refusals():
        transformer = core_transformer_config_from_args(args, MSATransformerConfig)
        config = MSAModelConfig.from_args(args, transformer)
        msa_layer_specs(transformer)  # builds no module, but refuses what no layer can be made of
    if args.msa_init_index is not None:
        index_initialization.check_method(
            args.msa_init_index,
            head_dim=transformer.kv_channels,
            index_head_dim=transformer.msa_indexer_head_dim,
            num_groups=transformer.num_query_groups,
            rotary_dims=rotary_dims(config),
        )
    check_checkpoint(args, transformer, padded_vocab_size(config))
    return config


def exit_with(error: ConfigError, rank: int) -> NoReturn:
    """Report a `ConfigError` once and stop with status 2."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


@contextlib.contextmanager
def megatron_refusals() -> Iterator[None]:
    """Megatron reports settings it cannot use with assertions and ValueErrors: make them `ConfigError`s."""
    try:
        yield
    except ConfigError:
        raise
    except (AssertionError, ValueError) as error:
        # A bare assertion has no message, but the line often says enough: assert args.save_interval > 0
        message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"Megatron refuses these settings: {' '.join(str(message).split())}") from error
