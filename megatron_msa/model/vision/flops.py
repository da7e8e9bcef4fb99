"""Floating-point operations and parameters of the vision part, in closed form.

Conventions of `megatron_msa.training.flops`: a multiply-add counts as 2; attention takes 2 matrix products
over the (query, key) pairs forward and 5 backward; other weights cost as much per weight and row as they have
elements, backward twice that. Within a segment every patch attends to every patch.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_msa.model.vision.config import VisionConfig

_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


def projector_width(config: VisionConfig, hidden_size: int) -> int:
    """Width of the hidden layers of projector and merge."""
    return config.vision_projector_hidden_size or hidden_size


def forward_flops(config: VisionConfig, hidden_size: int, segment_patches: Iterable[int]) -> float:
    """Of one forward pass over segments of these many patches.

    Args:
        config: of the encoder.
        hidden_size: of the language model.
        segment_patches: patches of each segment.
    """
    lengths = list(segment_patches)
    patches, pairs = sum(lengths), sum(length * length for length in lengths)
    return (
        _encoder(config, patches)
        + _FORWARD_PRODUCTS * _product(config, pairs)
        + _projection(config, hidden_size, patches)
    )


def step_flops(config: VisionConfig, hidden_size: int, *, patches: float, pairs: float) -> float:
    """Of forward and backward pass; a frozen encoder has only the forward pass.

    Gradients that nobody takes, of the pixels and of a frozen encoder's result, are not counted.

    Args:
        config: of the encoder.
        hidden_size: of the language model.
        patches: that the encoder took.
        pairs: (query, key) pairs within segments: the sum of the squares of their patches.
    """
    projection = 3 * _projection(config, hidden_size, patches)
    encoder, product = _encoder(config, patches), _product(config, pairs)
    if config.vision_mode == "freeze":
        into_encoder = 2 * patches * config.vision_hidden_size * projector_width(config, hidden_size)
        return encoder + _FORWARD_PRODUCTS * product + projection - into_encoder
    into_pixels = 2 * patches * config.patch_values * config.vision_hidden_size
    return 3 * encoder - into_pixels + (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * product + projection


def encoder_parameters(config: VisionConfig) -> int:
    """Patch embedding, its norm, and the layers with their biases and norms."""
    width, ffn = config.vision_hidden_size, config.vision_ffn_hidden_size
    biases_and_norms = 3 * width + width + ffn + width + 4 * width
    layer = _layer_matrices(config) + biases_and_norms
    return config.patch_values * width + 2 * width + config.vision_num_layers * layer


def projector_parameters(config: VisionConfig, hidden_size: int) -> int:
    """Projector and patch merge, with their biases."""
    width = projector_width(config, hidden_size)
    merged = config.vision_merge_size**2 * hidden_size
    biases = 2 * (width + hidden_size)
    return config.vision_hidden_size * width + width * hidden_size + (merged + hidden_size) * width + biases


def _layer_matrices(config: VisionConfig) -> int:
    width = config.vision_hidden_size
    return 4 * width * width + 2 * width * config.vision_ffn_hidden_size


def _encoder(config: VisionConfig, patches: float) -> float:
    """Forward pass of patch embedding and layers, without the attention's products."""
    embedding = config.patch_values * config.vision_hidden_size
    return 2.0 * patches * (embedding + config.vision_num_layers * _layer_matrices(config))


def _product(config: VisionConfig, pairs: float) -> float:
    """One matrix product over the pairs, in all layers."""
    return 2.0 * pairs * config.vision_hidden_size * config.vision_num_layers


def _projection(config: VisionConfig, hidden_size: int, patches: float) -> float:
    """Forward pass of projector and merge."""
    width, merged = projector_width(config, hidden_size), config.vision_merge_size**2
    per_patch = config.vision_hidden_size * width + width * hidden_size
    per_token = merged * hidden_size * width + width * hidden_size
    return 2.0 * (patches * per_patch + patches / merged * per_token)
