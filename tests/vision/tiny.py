"""A tiny multimodal model and its inputs, built on the tiny text model of the attention tests (fp64)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import VisualInput, number_of_tokens
from tests.attention.tiny import DEVICE, VOCABULARY

IMAGE, VIDEO = VOCABULARY - 1, VOCABULARY - 2
"""Ids of the placeholder tokens."""
PATCH, MERGE = 4, 2


def tiny_vision(**changes: Any) -> VisionConfig:
    """Two layers of three heads of 14 channels: 4 for each axis, 2 that are not turned."""
    values: dict[str, Any] = {
        "vision_mode": "train",
        "vision_image_token_id": IMAGE,
        "vision_video_token_id": VIDEO,
        "vision_num_layers": 2,
        "vision_hidden_size": 56,
        "vision_ffn_hidden_size": 36,
        "vision_num_attention_heads": 4,
        "vision_patch_size": PATCH,
        "vision_merge_size": MERGE,
        "vision_projector_hidden_size": 20,
        "vision_segment_frames": 2,
    }
    return VisionConfig(**values | changes)


def random_visuals(grids: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float64) -> VisualInput:
    """Random pixels in grids (t, h, w)."""
    patches = sum(t * h * w for t, h, w in grids)
    values = tiny_vision().patch_values
    return VisualInput(torch.randn(patches, values, dtype=dtype, device=DEVICE), torch.tensor(grids))


def interleaved(grids: Sequence[Sequence[int]], words: Sequence[int], *, merge: int = MERGE) -> Tensor:
    """Random words around the placeholders of visuals: [1, tokens].

    Args:
        grids: of the visuals; those with t > 1 are videos.
        words: how many stand before the first visual, between two, and behind the last one.
    """
    pieces = [_words(words[0])]
    for grid, tokens, behind in zip(grids, number_of_tokens(grids, merge), words[1:], strict=True):
        placeholder = VIDEO if grid[0] > 1 else IMAGE
        pieces += [torch.full((tokens,), placeholder), _words(behind)]
    return torch.cat(pieces)[None].to(DEVICE)


def _words(number: int) -> Tensor:
    return torch.randint(VIDEO, (number,))


def run(model: Any, tokens: Tensor, visuals: VisualInput | None, **inputs: Any) -> Tensor:
    """Logits [batch, sequence, vocabulary]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, visual_input=visuals, **inputs)
