"""Both models on the same tokens: the largest difference of their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf import sidecar
from megatron_msa.checkpoint.hf.families import by_config
from megatron_msa.checkpoint.hf.megatron_model import build, seed, single_process
from megatron_msa.checkpoint.hf.settings import from_arguments, to_model_config
from megatron_msa.checkpoint.hf.torch_dist import DistributedCheckpoint
from megatron_msa.phases import Phase


def verify(hf_folder: Path, checkpoint: Path, *, num_tokens: int = 256) -> str:
    """Run both models in fp32 on random tokens and describe how far apart they are.

    MSA layers select blocks (phase sparse) on both sides. Memory: both models, 8 bytes per parameter.

    Args:
        hf_folder: of the Hugging Face model.
        checkpoint: folder of one torch_dist checkpoint.
        num_tokens: length of the one sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = (
        by_config(sidecar.read_config(hf_folder), str(hf_folder))
        .language_config(sidecar.load_config(hf_folder))
        .vocab_size
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (1, num_tokens), generator=generator).to(device)
    expected = hf_logits(hf_folder, tokens)
    actual = megatron_logits(checkpoint, tokens)[..., :vocabulary]
    difference = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    return (
        f"verified on {num_tokens} random tokens in fp32: largest difference of a logit {difference:.2e} "
        f"(largest logit {scale:.2e})"
    )


@torch.no_grad()
def hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of transformers' model, [b, s, vocabulary], fp32."""
    model = load_hf_model(folder).to(tokens.device)
    return model(input_ids=tokens, use_cache=False).logits.float()


def load_hf_model(folder: Path) -> Any:
    """The model as transformers loads it, in fp32, with plain attention."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    family = by_config(sidecar.read_config(folder), str(folder))
    loader = AutoModelForImageTextToText if family.text_config else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def megatron_logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """Logits of Megatron's model on one rank, [b, s, padded vocabulary], fp32."""
    with single_process():
        model = load_megatron_model(checkpoint).to(tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None).float()


def load_megatron_model(checkpoint: Path, **transformer_changes: Any) -> Any:
    """The model of a checkpoint, in evaluation mode and phase sparse, on the existing process groups.

    Args:
        checkpoint: folder of one torch_dist checkpoint.
        transformer_changes: fields of the MSATransformerConfig, such as the parallel layout.
    """
    opened = DistributedCheckpoint(checkpoint)
    settings = from_arguments(opened.common_state["args"])
    seed()
    config = to_model_config(
        settings, msa_backend="reference", perform_initialization=False, **transformer_changes
    )
    model = build(config)
    state = {"model": model.sharded_state_dict(metadata=opened.common_state.get("content_metadata"))}
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint))["model"])
    for layer in msa_layers([model]):
        layer.phase = Phase.SPARSE
    return model.eval()
