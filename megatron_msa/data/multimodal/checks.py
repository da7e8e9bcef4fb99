"""Checks of multimodal data before any process group starts, and what it asks of Megatron's own flags."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.errors import ConfigError


def prepare_args(args: Any) -> None:
    """Have Megatron take our loaders and save their state within its checkpoints; before it validates.

    Raises:
        ConfigError: another kind of data loader was asked for.
    """
    if getattr(args, "multimodal_data_path", None) is None:
        return
    if args.dataloader_type not in (None, "external"):
        raise ConfigError(
            f"--dataloader-type is {args.dataloader_type}, but --multimodal-data-path brings its own data "
            "loader; leave the flag out"
        )
    args.dataloader_type = "external"
    args.dataloader_save = args.save


def check_multimodal_data(args: Any, tokenizer: Any) -> None:
    """Check everything about multimodal data that can be known before training starts.

    Args:
        args: Megatron's arguments, after its own validation.
        tokenizer: of the run.

    Raises:
        ConfigError: with the value got and what to change.
    """
    config = MultimodalDataConfig.from_args(args)
    if config is None:
        return
    require_energon("--multimodal-data-path")
    _check_flags(args, config)
    # Imports Energon, which is optional.
    from megatron_msa.data.multimodal.loaders import LoaderFactory, Place

    factory = LoaderFactory(args, tokenizer, Place(rank=0, ranks=args.data_parallel_size))
    for part in ("train", "val") if args.eval_iters else ("train",):
        factory.shards(part)


def require_energon(flag: str) -> None:
    """Before the first import of what needs the optional package.

    Raises:
        ConfigError: it is not installed; names the flag that asks for it.
    """
    if importlib.util.find_spec("megatron.energon") is None:
        raise ConfigError(
            f"{flag} is set, but Megatron-Energon is not installed; pip install 'megatron-msa[multimodal]'"
        )


def described_parts(args: Any) -> dict[str, str]:
    """The size of each part of the data, for the dry run."""
    from megatron_msa.data.multimodal.shards import has_part, list_shards

    sizes = {}
    for part in ("train", "val", "test"):
        if has_part(args.multimodal_data_path, part):
            shards = list_shards(args.multimodal_data_path, part)
            samples = sum(shard.samples for shard in shards)
            sizes[f"part {part}"] = f"{samples:,} samples in {len(shards):,} shards"
    return sizes


def _check_flags(args: Any, config: MultimodalDataConfig) -> None:
    if args.vision_mode == "none" and not config.multimodal_blind:
        raise ConfigError(
            "--multimodal-data-path with --vision-mode none: no encoder would see the images. Use "
            "--vision-mode train, or --multimodal-blind for a control that trains on the placeholder "
            "tokens alone"
        )
    if args.vision_mode != "none" and config.multimodal_blind:
        raise ConfigError(
            f"--multimodal-blind with --vision-mode {args.vision_mode}: the encoder would get no images; "
            "leave one of the two out"
        )
    for flag, value in (
        ("--dataloader-inter-document-masking", args.dataloader_inter_document_masking),
        ("--calculate-per-token-loss", args.calculate_per_token_loss),
    ):
        if not value:
            raise ConfigError(
                f"--multimodal-data-path needs {flag}: several samples share a sequence, and the tokens that "
                "count differ from one to the next; add the flag"
            )
    for flag, value, why in (
        ("--full-validation", args.full_validation, "validation reads --eval-iters batches"),
        ("--multiple-validation-sets", args.multiple_validation_sets, "there is one part called val"),
        ("--mock-data", args.mock_data, "leave it out"),
        (
            "--num-layers-per-virtual-pipeline-stage",
            args.virtual_pipeline_model_parallel_size,
            "Megatron 0.19.2 saves the state of one data loader for each rank",
        ),
    ):
        if value:
            raise ConfigError(f"{flag} is set, which --multimodal-data-path does not support: {why}")
    has_text = bool(args.data_path or args.train_data_path or args.per_split_data_args_path)
    if config.share < 1 and not has_text:
        raise ConfigError(
            f"--multimodal-weight is {config.multimodal_weight}, but there is no text data for the other "
            "sequences: give --data-path, or leave the weight at 1"
        )
    if config.share == 1 and has_text:
        raise ConfigError(
            "--data-path and --multimodal-data-path are both set, but --multimodal-weight is 1, so the text "
            "would never be read; give the share of multimodal sequences"
        )
