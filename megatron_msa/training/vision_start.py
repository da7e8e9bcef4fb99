"""`--vision-load`: encoder and projector start from another run's or another model's checkpoint.

A checkpoint of the run itself wins: what it has of the vision part is loaded with everything else. Otherwise,
with no checkpoint at all or with one of a text model, the vision part is read once, before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.training import print_rank_0
from torch import nn

from megatron_msa.checkpoint.inspection import find_checkpoint, tensor_shapes
from megatron_msa.errors import ConfigError
from megatron_msa.model.multimodal import MultimodalGPT

_PREFIX = "vision_model."


def vision_checkpoint(folder: str) -> Path:
    """The checkpoint that ``--vision-load`` names.

    Raises:
        ConfigError: there is none, or it has no vision part.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"--vision-load {folder} has no checkpoint (no latest_checkpointed_iteration.txt)")
    if not any(name.startswith(_PREFIX) for name in tensor_shapes(checkpoint)):
        raise ConfigError(
            f"--vision-load {folder}: the checkpoint {checkpoint.name} is of a text model; name one with a "
            "vision part, such as a MiniMax-M3 converted by tools/convert_checkpoint.py hf-to-megatron"
        )
    return checkpoint


class VisionStart:
    """Reads the vision part where the run has none yet.

    Args:
        folder: --vision-load; None: the run's own checkpoint must have a vision part, if there is one.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._is_loaded = False

    def before_load(self, checkpoint: Path, request: dict[str, Any]) -> None:
        """Take the vision part out of what is about to be loaded, in place, if the checkpoint has none.

        Args:
            checkpoint: folder of one torch_dist checkpoint.
            request: Megatron's sharded state dict.

        Raises:
            ConfigError: it has none, and nothing says where else the vision part comes from; or the
                optimizer's state is to be loaded, which cannot be complete then.
        """
        if any(name.startswith(_PREFIX) for name in tensor_shapes(checkpoint)):
            self._is_loaded = True
            return
        if self._folder is None:
            raise ConfigError(
                f"the checkpoint {checkpoint} is of a text model, without a vision encoder; say with "
                "--vision-load where the encoder comes from, or use --vision-mode none"
            )
        if "optimizer" in request:
            raise ConfigError(
                f"the checkpoint {checkpoint} is of a text model: its optimizer has no state for the vision "
                "part; add --no-load-optim to start with a new one"
            )

        def resolve(entry: Any) -> Any:
            is_vision = isinstance(entry, ShardedBase) and entry.key.startswith(_PREFIX)
            return LocalNonpersistentObject(entry.data) if is_vision else entry

        for name in request:
            if name.startswith("model"):
                dict_list_map_inplace(resolve, request[name])

    def finish(self, model: list[nn.Module], optimizer: MegatronOptimizer | None) -> None:
        """Once model and optimizer are there: read the vision part if it has not been loaded.

        Collective over all ranks, also those of other pipeline stages.
        """
        if self._is_loaded or self._folder is None:
            return
        checkpoint = vision_checkpoint(self._folder)
        modules = (module for chunk in model for module in chunk.modules())
        read_vision(next((each for each in modules if isinstance(each, MultimodalGPT)), None), checkpoint)
        if optimizer is not None:
            optimizer.reload_model_params()  # its fp32 copies
        print_rank_0(f"vision encoder and projector loaded from {checkpoint}")


@torch.no_grad()
def read_vision(model: MultimodalGPT | None, checkpoint: Path) -> None:
    """Load the vision part of this rank's model, if it has one, in any parallel layout.

    Raises:
        ConfigError: tensors are missing or have other shapes.
    """
    request: dict[str, ShardedTensor] = {}
    if model is not None and model.vision_model is not None:
        metadata = dist_checkpointing.load_content_metadata(str(checkpoint))
        entries = model.vision_model.sharded_state_dict(prefix=_PREFIX, metadata=metadata)
        request = {name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}
    found = tensor_shapes(checkpoint)
    for entry in request.values():
        if found.get(entry.key) != tuple(entry.global_shape):
            raise ConfigError(
                f"--vision-load: {entry.key} has the shape {found.get(entry.key)} in {checkpoint}, but "
                f"{tuple(entry.global_shape)} by the --vision-* flags; give the flags of that encoder (its "
                "megatron_flags.sh has them)"
            )
    loaded = dist_checkpointing.load(dict(request), str(checkpoint))
    if model is not None and model.vision_model is not None:
        parameters = dict(model.named_parameters())
        for name in request:
            parameters[name].copy_(loaded[name])
