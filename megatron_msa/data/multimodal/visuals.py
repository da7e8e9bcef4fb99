"""The visuals of a microbatch on every tensor-parallel rank of the first pipeline stage."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megatron_msa.model.vision.inputs import VisualInput


def visuals_on_this_rank(
    sample: dict[str, Any] | None, *, patch_values: int, dtype: torch.dtype, device: torch.device | int
) -> VisualInput | None:
    """Broadcast from tensor-parallel rank 0, which reads; a collective of the tensor-parallel group.

    Args:
        sample: the microbatch; None on the other ranks.
        patch_values: numbers in a patch.
        dtype: to compute in; what travels is of this type.
        device: of the model.

    Returns:
        None for a microbatch of text.
    """
    visual: VisualInput | None = None
    if sample is not None and sample.get("patches") is not None:
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
