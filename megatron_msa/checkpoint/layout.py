"""What a checkpoint of a model holds, from Megatron's own code and without memory for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_msa.checkpoint.hf.megatron_model import build, single_process
from megatron_msa.model.gpt import MSAModelConfig


@dataclass(frozen=True)
class Layout:
    """Names in a distributed checkpoint.

    Attributes:
        shapes: of the parameters and buffers, global.
        objects: what is not a tensor, by the name it is stored under.
    """

    shapes: dict[str, tuple[int, ...]]
    objects: dict[str, Any]


def layout_of(config: MSAModelConfig, content_metadata: dict[str, Any] | None = None) -> Layout:
    """The layout of a model's checkpoint.

    Args:
        config: for one process.
        content_metadata: what a checkpoint says of its notation; None for Megatron's default.
    """
    with single_process():
        with torch.device("meta"):
            model = build(config)
        metadata = {**(content_metadata or {}), "dp_cp_group": parallel_state.get_data_parallel_group()}
        entries = list(model.sharded_state_dict(metadata=metadata).values())
    shapes: dict[str, tuple[int, ...]] = {}
    objects = {}
    while entries:
        entry = entries.pop(0)
        if isinstance(entry, ShardedTensorFactory):
            entries = [*nested_values(entry.build()), *entries]
        elif isinstance(entry, ShardedTensor):
            shapes[entry.key] = tuple(entry.global_shape)
        elif isinstance(entry, ShardedObject):
            objects[entry.unique_key] = entry.data
    return Layout(shapes, objects)
