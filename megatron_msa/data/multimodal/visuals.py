"""The visuals of a microbatch on every tensor-parallel rank of the first pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.inputs import VisualInput, placeholder_mask


def refuse_placeholders(tokens: Tensor, ids: Sequence[int]) -> None:
    """Text must hold no placeholder, which the model would take for a word.

    Args:
        tokens: of text, on the CPU: on a GPU the host would wait for the answer.
        ids: of the placeholder tokens.

    Raises:
        ConfigError: it holds one.
    """
    if placeholder_mask(tokens, ids).any():
        raise ConfigError(
            f"the text data (--data-path) holds placeholder tokens {tuple(ids)} (--vision-image-token-id, "
            "--vision-video-token-id), which stand for images; take ids that no text becomes"
        )


def visuals_on_this_rank(
    sample: dict[str, Any] | None,
    *,
    patch_values: int,
    placeholder_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | int,
) -> VisualInput | None:
    """Broadcast from tensor-parallel rank 0, which reads; a collective of the tensor-parallel group.

    Args:
        sample: the microbatch, on the CPU; None on the other ranks.
        patch_values: numbers in a patch.
        placeholder_ids: tokens that stand for images.
        dtype: to compute in; what travels is of this type.
        device: of the model.

    Returns:
        None for a microbatch of text.

    Raises:
        ConfigError: a microbatch of text holds placeholders.
    """
    visual: VisualInput | None = None
    if sample is not None and sample.get("patches") is None:
        refuse_placeholders(sample["tokens"], placeholder_ids)
    elif sample is not None:
        visual = VisualInput(sample["patches"], sample["grid_thw"]).to(device, dtype)
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return visual

    source = parallel_state.get_tensor_model_parallel_src_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    sizes = [0, 0] if visual is None else [len(visual.grid_thw), len(visual.patches)]
    header = torch.tensor(sizes, dtype=torch.int64, device=device)
    torch.distributed.broadcast(header, source, group=group)
    visuals, patches = header.tolist()
    if not visuals:
        return None
    if visual is None:
        grid = torch.empty(visuals, 3, dtype=torch.int64, device=device)
        values = torch.empty(patches, patch_values, dtype=dtype, device=device)
    else:
        grid, values = visual.grid_thw.to(device), visual.patches
    torch.distributed.broadcast(grid, source, group=group)
    torch.distributed.broadcast(values, source, group=group)
    return VisualInput(values, grid.cpu())
