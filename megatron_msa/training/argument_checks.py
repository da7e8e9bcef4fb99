"""Checks of parsed arguments whose failure Megatron would report late, obscurely, or not at all."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from megatron_msa.errors import ConfigError
from megatron_msa.phases import PhaseSchedule
from megatron_msa.training.layout_checks import check_layout
from megatron_msa.training.phase_control import freezes
from megatron_msa.training.vision_start import vision_checkpoint


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def transformer_engine_present() -> bool:
    return is_installed("transformer_engine")


def check_flags(args: argparse.Namespace, *, has_gpu: bool) -> None:
    """Check what can be checked before Megatron completes and validates the arguments.

    Raises:
        ConfigError: names the flag, the value and what to use instead.
    """
    for flag, value, allowed in _unsupported(args):
        raise ConfigError(f"{flag} is {value}; MSA models do not support it, use {allowed}")
    if args.transformer_impl == "transformer_engine" and not transformer_engine_present():
        raise ConfigError(
            "--transformer-impl transformer_engine, but Transformer Engine is not installed; install the "
            "extra (pip install 'megatron-msa[te]') or use --transformer-impl local"
        )
    if not has_gpu and args.distributed_backend != "gloo":
        raise ConfigError(
            f"--distributed-backend {args.distributed_backend} needs GPUs and this machine has none; leave "
            "the flag out or use gloo"
        )
    if not has_gpu and args.msa_backend == "triton":
        raise ConfigError("--msa-backend triton needs a GPU and this machine has none; leave it at auto")
    if args.seq_length and args.msa_block_size > 0 and args.seq_length % args.msa_block_size:
        raise ConfigError(
            f"--seq-length {args.seq_length} is not a multiple of --msa-block-size {args.msa_block_size}; "
            "use a sequence length of whole blocks"
        )
    if args.vision_mode != "none":
        _check_vision(args)
    elif args.log_encoder_time:
        raise ConfigError("--log-encoder-time without a vision encoder to measure: add --vision-mode")
    check_layout(args)
    if args.save and not args.save_interval:
        raise ConfigError("--save is set without --save-interval; say every how many iterations to save")
    if args.keep_newest_checkpoints < 1:
        raise ConfigError(
            f"--keep-newest-checkpoints is {args.keep_newest_checkpoints}; it must be at least 1"
        )
    if args.keep_newest_checkpoints > 1 and not args.save_retain_interval:
        raise ConfigError(
            f"--keep-newest-checkpoints {args.keep_newest_checkpoints} without --save-retain-interval: no "
            "checkpoint is ever deleted; leave it out, or set the interval of those to keep for good"
        )
    if args.wandb_project:
        _check_wandb(args)


def check_training(args: argparse.Namespace) -> None:
    """Check the phase schedule, the learning rate and the optimizer of a training run, validated by Megatron.

    Raises:
        ConfigError: names the flag, the value and what to use instead.
    """
    schedule = PhaseSchedule.parse(args.msa_schedule)
    if args.skip_train:
        return
    if not args.train_iters and not args.train_samples:
        raise ConfigError("neither --train-iters nor --train-samples is set; say how long to train")
    if args.lr is None:
        raise ConfigError("--lr is missing; there is no default learning rate")
    samples = args.train_samples or args.train_iters * args.global_batch_size
    iterations = args.train_iters or samples // args.global_batch_size
    if args.train_samples and args.step_batch_size_schedule is not None:
        iterations = 0  # growing batches: more iterations than that, how many only Megatron knows
    schedule.check_length(train_iters=iterations, train_tokens=samples * args.seq_length)
    _check_learning_rate_warmup(args)
    if any(freezes(phase) for phase in schedule.phases):
        _check_freezing(args)


def _unsupported(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """What would replace our model or its configuration, or be ignored by it."""
    settings = [
        ("--multi-latent-attention", args.multi_latent_attention, "grouped-query attention"),
        ("--spec", args.spec, "the layer specs of this package"),
        ("--heterogeneous-layers-config-path", args.heterogeneous_layers_config_path, "--msa-layer-freq"),
        ("--hybrid-layer-pattern", args.hybrid_layer_pattern, "--num-layers"),
        ("--hybrid-override-pattern", args.hybrid_override_pattern, "--num-layers"),
        ("--experimental-attention-variant", args.experimental_attention_variant, "the --msa-* flags"),
        ("--freeze-all-layers", args.freeze_all_layers, "--skip-train"),
        ("--perform-rl-step", args.perform_rl_step, "pretraining"),
    ]
    return [(flag, value, allowed) for flag, value, allowed in settings if value]


def _check_vision(args: argparse.Namespace) -> None:
    """What the loss and the documents of a multimodal model need; the model checks its own sizes."""
    if not (args.calculate_per_token_loss or args.skip_train):
        raise ConfigError(
            f"--vision-mode {args.vision_mode} needs --calculate-per-token-loss: visual tokens have no loss, "
            "so microbatches differ in the tokens that count, and a mean of their means would depend on the "
            "layout; add the flag"
        )
    if args.vision_mode == "freeze" and not (args.vision_load or args.load or args.pretrained_checkpoint):
        raise ConfigError(
            "--vision-mode freeze without --vision-load or --load would keep an encoder of random weights; "
            "say where its weights are, or use --vision-mode train"
        )
    if args.vision_load:
        vision_checkpoint(args.vision_load)


def _check_wandb(args: argparse.Namespace) -> None:
    if not is_installed("wandb"):
        raise ConfigError(
            "--wandb-project is set, but wandb is not installed; pip install 'megatron-msa[wandb]'"
        )
    if not args.wandb_save_dir and not args.save:
        raise ConfigError(
            "--wandb-project is set, but no folder for its files; add --wandb-save-dir or --save"
        )


def _check_learning_rate_warmup(args: argparse.Namespace) -> None:
    unit = "iters" if args.train_iters else "samples"
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    if warmup >= decay:
        raise ConfigError(
            f"the learning rate warms up for {warmup:g} {unit} (--lr-warmup-{unit} or --lr-warmup-fraction), "
            f"but its schedule ends after {decay} (--lr-decay-{unit}, by default --train-{unit}); shorten "
            "the warmup"
        )


def _check_freezing(args: argparse.Namespace) -> None:
    """The phases dense and index_only freeze parameters through the optimizer (see `phase_control`)."""
    for flag, value, allowed in (
        ("--optimizer", args.optimizer, ("adam", "sgd")),
        ("--optimizer-cpu-offload", args.optimizer_cpu_offload, (False,)),
        ("--optimizer-cuda-graph", args.optimizer_cuda_graph, (False,)),
        ("--use-megatron-fsdp", args.use_megatron_fsdp, (False,)),
        ("--use-torch-fsdp2", args.use_torch_fsdp2, (False,)),
    ):
        if value not in allowed:
            names = " or ".join(str(choice) for choice in allowed)
            raise ConfigError(
                f"{flag} is {value}, but --msa-schedule {args.msa_schedule} freezes parameters (dense, "
                f"index_only), which works only with {names}; change it or leave those phases out"
            )
