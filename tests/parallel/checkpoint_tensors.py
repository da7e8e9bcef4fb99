"""The tensors of a distributed checkpoint, whole, whatever layout wrote it."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model (not of the optimizer), by its name in the checkpoint."""
    metadata = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
