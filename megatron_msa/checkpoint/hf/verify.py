"""Both models on the same tokens, and the same image: the largest difference of their logits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf import sidecar
from megatron_msa.checkpoint.hf.families import by_config
from megatron_msa.checkpoint.hf.megatron_model import build, seed, single_process
from megatron_msa.checkpoint.hf.settings import Settings, from_arguments, to_model_config
from megatron_msa.checkpoint.hf.torch_dist import DistributedCheckpoint
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import VisualInput, number_of_tokens, placeholder_mask
from megatron_msa.phases import Phase


def verify(hf_folder: Path, checkpoint: Path, *, num_tokens: int = 256) -> str:
    """Run both models in fp32 on random tokens and describe how far apart they are.

    A model with a vision part gets one random image among the tokens. The axes that its encoder turns are
    those of the installed transformers, whatever the checkpoint says (see `families.minimax_m3_vision`).

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
    vision = VisionConfig.from_args(_settings_of(checkpoint))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (1, num_tokens), generator=generator).to(device)
    image = None
    if vision is not None:
        image = random_image(vision, num_tokens, generator).to(device)
        tokens = with_placeholders(tokens, image, vision)
    expected = hf_logits(hf_folder, tokens, image)
    changes = {} if vision is None else {"vision_rope_axes": turned_axes(sidecar.load_config(hf_folder))}
    actual = megatron_logits(checkpoint, tokens, image, changes)[..., :vocabulary]
    difference = float((actual - expected).abs().max())
    scale = float(expected.abs().max())
    among = "" if image is None else f", {image.patches.shape[0]} random patches of an image among them,"
    return (
        f"verified on {num_tokens} random tokens{among} in fp32: largest difference of a logit "
        f"{difference:.2e} (largest logit {scale:.2e})"
    )


def random_image(vision: VisionConfig, num_tokens: int, generator: torch.Generator) -> VisualInput:
    """One image, wider than high, of at most half of the tokens."""
    height = max(1, int((num_tokens // 4) ** 0.5))
    grid = (1, height * vision.vision_merge_size, 2 * height * vision.vision_merge_size)
    patches = torch.randn(grid[1] * grid[2], vision.patch_values, generator=generator)
    return VisualInput(patches, torch.tensor([grid]))


def with_placeholders(tokens: Tensor, image: VisualInput, vision: VisionConfig) -> Tensor:
    """[1, s] with the placeholders of the image in the middle, and nowhere else."""
    tokens = tokens.masked_fill(placeholder_mask(tokens, vision.placeholder_ids), _other_token(vision))
    (count,) = number_of_tokens(image.grid_thw, vision.vision_merge_size)
    start = (tokens.shape[1] - count) // 2
    tokens[0, start : start + count] = vision.placeholder_ids[0]
    return tokens


def _other_token(vision: VisionConfig) -> int:
    return next(token for token in range(3) if token not in vision.placeholder_ids)


def turned_axes(config: Any) -> str:
    """Which axes transformers' rotary embedding of the vision tower depends on: "thw" or a part of it."""
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    embedding = modeling.MiniMaxM3VLVisionRotaryEmbedding(config.vision_config)
    at_origin = embedding(torch.zeros(1), torch.zeros(1, 3, dtype=torch.long))[1]
    turned = ""
    for axis, position in zip("thw", torch.eye(3, dtype=torch.long), strict=True):
        if not torch.equal(embedding(torch.zeros(1), position[None])[1], at_origin):
            turned += axis
    return turned


@torch.no_grad()
def hf_logits(folder: Path, tokens: Tensor, image: VisualInput | None = None) -> Tensor:
    """Logits of transformers' model, [b, s, vocabulary], fp32."""
    model = load_hf_model(folder).to(tokens.device)
    visual = {}
    if image is not None:
        visual = {"pixel_values": image.patches, "image_grid_thw": image.grid_thw}
    return model(input_ids=tokens, use_cache=False, **visual).logits.float()


def load_hf_model(folder: Path) -> Any:
    """The model as transformers loads it, in fp32, with plain attention."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    family = by_config(sidecar.read_config(folder), str(folder))
    loader = AutoModelForImageTextToText if family.text_config else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def megatron_logits(
    checkpoint: Path,
    tokens: Tensor,
    image: VisualInput | None = None,
    settings_changes: Settings | None = None,
) -> Tensor:
    """Logits of Megatron's model on one rank, [b, s, padded vocabulary], fp32."""
    with single_process():
        model = load_megatron_model(checkpoint, settings_changes).to(tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        visual = {} if image is None else {"visual_input": image}
        return model(tokens, positions, None, **visual).float()


def _settings_of(checkpoint: Path) -> argparse.Namespace:
    return argparse.Namespace(**from_arguments(DistributedCheckpoint(checkpoint).common_state["args"]))


def load_megatron_model(
    checkpoint: Path, settings_changes: Settings | None = None, **transformer_changes: Any
) -> Any:
    """The model of a checkpoint, in evaluation mode and phase sparse, on the existing process groups.

    Args:
        checkpoint: folder of one torch_dist checkpoint.
        settings_changes: settings that replace the checkpoint's.
        transformer_changes: fields of the MSATransformerConfig, such as the parallel layout.
    """
    opened = DistributedCheckpoint(checkpoint)
    settings = from_arguments(opened.common_state["args"]) | (settings_changes or {})
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
