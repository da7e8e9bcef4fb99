"""The model and the tokenizer of a checkpoint, ready for an engine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf.megatron_model import build, seed
from megatron_msa.checkpoint.inspection import find_checkpoint
from megatron_msa.checkpoint.newest import damage
from megatron_msa.data.metadata import load_tokenizer, tokenizer_config_from_args, tokenizer_fingerprint
from megatron_msa.errors import ConfigError
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint
from megatron_msa.phases import Phase, PhaseSchedule


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        model: whole or this rank's shard, in evaluation mode, on this rank's device.
        args: that training saved.
        iteration: of training.
        phase: in which training was; its MSA layers are in it.
    """

    model: GPTModel
    args: argparse.Namespace
    iteration: int
    phase: Phase


def load(
    folder: str | Path, *, step: int | None = None, dtype: torch.dtype | None = None, **settings: Any
) -> Loaded:
    """Load a checkpoint of any parallel layout for the process groups that exist (see `process_groups`).

    Args:
        folder: with ``latest_checkpointed_iteration.txt`` (--save of training).
        step: iteration. Default: the latest.
        dtype: to compute in. Default: on a GPU the one that training used, on a CPU fp32.
        settings: arguments by name that replace those in the checkpoint.

    Raises:
        ConfigError: no checkpoint, one that cannot be read, or arguments that no model can be made of.
    """
    checkpoint = find_checkpoint(str(folder), step)
    if checkpoint is None:
        raise ConfigError(f"{folder} holds no checkpoint (no latest_checkpointed_iteration.txt)")
    if not dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint)):
        raise ConfigError(
            f"{checkpoint} is no distributed checkpoint (--ckpt-format torch_dist); save it again with that"
        )
    if (problem := damage(checkpoint)) is not None:
        raise ConfigError(f"{checkpoint} is damaged: {problem}; restore it, or choose another --ckpt-step")
    common = _common(checkpoint)
    args, iteration = common["args"], int(common.get("iteration") or 0)
    on_gpu = torch.cuda.is_available()
    if dtype is None:
        dtype = getattr(args, "params_dtype", torch.bfloat16) if on_gpu else torch.float32
    config = model_config_from_checkpoint(args, **_for_inference(args, dtype) | settings)
    _check_vocabulary_divides(config.vocab_size)
    seed()
    model = build(config)
    state = {"model": model.sharded_state_dict(metadata=common.get("content_metadata"))}
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint))["model"])
    model = model.to("cuda" if on_gpu else "cpu").eval()
    tokens = getattr(args, "consumed_train_samples", 0) * getattr(args, "seq_length", 0)
    schedule = PhaseSchedule.parse(config.transformer.msa_schedule)
    phase = schedule.phase_at(iteration=iteration, tokens=tokens)
    for layer in msa_layers(model):
        layer.phase = phase
    return Loaded(model, args, iteration, phase)


def tokenizer_for(
    args: argparse.Namespace, *, tokenizer_type: str | None = None, tokenizer_model: str | None = None
) -> Any:
    """The tokenizer that a checkpoint was trained with, or another place where it lies now.

    Args:
        args: of the checkpoint.
        tokenizer_type, tokenizer_model: in place of those in ``args``.

    Raises:
        ConfigError: it cannot be built, has more ids than the checkpoint has embeddings, or is not the one
            of its training.
    """
    config = tokenizer_config_from_args(args)
    if tokenizer_type is not None:
        config.tokenizer_type = tokenizer_type
    if tokenizer_model is not None:
        config.tokenizer_model = tokenizer_model
    if config.tokenizer_type is None:
        raise ConfigError("the checkpoint does not say which tokenizer it was trained with: --tokenizer-type")
    tokenizer = load_tokenizer(config)
    given = f"--tokenizer-type {config.tokenizer_type} --tokenizer-model {config.tokenizer_model}"
    # The embedding may have any number of rows more: --padded-vocab-size, and conversions pad as they like.
    embeddings = getattr(args, "padded_vocab_size", None)
    if embeddings is not None and tokenizer.vocab_size > embeddings:
        raise ConfigError(
            f"the tokenizer {given} has {tokenizer.vocab_size} ids, but the checkpoint has {embeddings} "
            "embeddings; use the tokenizer it was trained with"
        )
    # Converted checkpoints, and those of Megatron's own entry, do not have it.
    trained_with = getattr(args, "tokenizer_fingerprint", None)
    if trained_with is not None and tokenizer_fingerprint(tokenizer) != trained_with:
        raise ConfigError(
            f"the tokenizer {given} ({tokenizer.vocab_size} ids, end of document {tokenizer.eod}) is another "
            "one than the checkpoint was trained with: its size or its ids of a text differ; use that one"
        )
    return tokenizer


def _common(checkpoint: Path) -> dict[str, Any]:
    """What is no tensor in a checkpoint."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ConfigError(
            f"the arguments in {checkpoint} cannot be read ({type(error).__name__}); restore it, or choose "
            "another --ckpt-step"
        ) from error
    if "args" not in common:
        raise ConfigError(
            f"{checkpoint} does not hold the arguments of its training; no model can be made of it"
        )
    return common


def _for_inference(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    is_mixture = getattr(args, "num_experts", None) is not None
    values: dict[str, Any] = {
        "tensor_model_parallel_size": tensor_parallel,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        # Megatron's mixtures of experts ask for it; without it batches need not divide by the ranks.
        "sequence_parallel": is_mixture and tensor_parallel > 1,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,
        "mtp_num_layers": None,
    }
    if is_mixture:
        values["moe_token_dispatcher_type"] = "alltoall"
    if getattr(args, "msa_schedule", None) is None:  # a dense run of Megatron's own entry
        values |= {"msa_schedule": "dense@0", "msa_layer_freq": f"([0]*{args.num_layers})"}
    return values


def _check_vocabulary_divides(padded: int | None) -> None:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if padded is not None and padded % ranks:
        raise ConfigError(
            f"the checkpoint's {padded} embeddings do not divide by --tensor-model-parallel-size {ranks}; "
            "use a size that divides them"
        )
