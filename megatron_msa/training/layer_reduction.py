"""Gathers what the MSA layers measured, over layers and ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_msa.attention.layer_metrics import QUALITY_NAMES, LayerMetrics

_NAMES = ("kl", *QUALITY_NAMES)


def numbered_layers(model: list[nn.Module], num_decoder_layers: int) -> list[tuple[int, nn.Module]]:
    """(1-based layer number, MSA layer) of this rank; multi-token-prediction layers follow the decoder's."""
    layers = []
    for chunk in model:
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "metrics", None), LayerMetrics):
                # MTP layers count from 1 again.
                offset = num_decoder_layers if ".mtp." in f".{name}." else 0
                layers.append((module.layer_number + offset, module))
    return layers


def collect(
    model: list[nn.Module], *, num_decoder_layers: int, num_mtp_layers: int, device: torch.device | int | str
) -> dict[str, dict[int, float]]:
    """Means per layer since the last call, over rows, GQA groups, microbatches and all ranks.

    Resets the layers. Collective over every rank: pipeline stages own layers, tensor-parallel ranks own
    groups, context- and data-parallel ranks own rows. Sums and counts are reduced, so the means do not depend
    on the layout.

    Returns:
        name -> {layer number: mean}; layers that measured nothing are left out.
    """
    num_layers = num_decoder_layers + num_mtp_layers
    sums = torch.zeros(len(_NAMES), num_layers, 2, dtype=torch.float64, device=device)
    for number, layer in numbered_layers(model, num_decoder_layers):
        for row, name in enumerate(_NAMES):
            if name in layer.metrics.sums:
                sums[row, number - 1] += layer.metrics.sums[name]
        layer.metrics.reset()
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ):
        torch.distributed.all_reduce(sums, group=group)
    return _means(sums)


def _means(sums: Tensor) -> dict[str, dict[int, float]]:
    """[names, layers, (sum, count)] -> name -> {1-based layer: mean}."""
    result: dict[str, dict[int, float]] = {}
    for name, rows in zip(_NAMES, sums.tolist(), strict=True):
        per_layer = {number: total / count for number, (total, count) in enumerate(rows, 1) if count}
        if per_layer:
            result[name] = per_layer
    return result
