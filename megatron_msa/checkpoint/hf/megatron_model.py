"""Megatron's model of some settings: its tensors without their data, or the model itself for a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_msa.checkpoint.hf.settings import Settings, to_model_config
from megatron_msa.model.gpt import MSAModelBuilder, MSAModelConfig


class Piece(NamedTuple):
    """A part of a tensor of the model, and where it lies in a tensor of the checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the piece in the model, without the leading axes that count layers or experts."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """With those axes, as in the checkpoint."""
        return (1,) * (len(self.global_shape) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint of a model holds.

    Attributes:
        shapes: name in the model -> shape.
        dtypes: name in the model -> dtype that the model gives it.
        pieces: name in the model -> its pieces, which lie one after the other along its first dimension.
        objects: key in the checkpoint -> what is not a tensor (empty states of layers).
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    pieces: dict[str, list[Piece]]
    objects: dict[str, Any]


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Process groups of one rank, unless the caller has some already."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    started = not torch.distributed.is_initialized()
    if started:
        # A store in memory: no port, no launcher.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if started:
            torch.distributed.destroy_process_group()


def blueprint(
    settings: Settings, dtype: torch.dtype, content_metadata: dict[str, Any] | None = None
) -> Blueprint:
    """The tensors of the model, from Megatron's own code, without memory for them.

    Args:
        settings: of the model.
        dtype: of the parameters.
        content_metadata: what a checkpoint says of its notation; None for Megatron's default.
    """
    config = to_model_config(settings, dtype=dtype, perform_initialization=False, use_cpu_initialization=True)
    with single_process():
        with torch.device("meta"):
            model = build(config)
        metadata = {**(content_metadata or {}), "dp_cp_group": parallel_state.get_data_parallel_group()}
        entries = model.sharded_state_dict(metadata=metadata)
    shapes, dtypes, pieces, objects = {}, {}, {}, {}
    for name, entry in entries.items():
        if isinstance(entry, ShardedObject):
            objects[entry.unique_key] = entry.data
            continue
        tensors = [entry] if isinstance(entry, ShardedTensor) else _built(entry)
        pieces[name] = [
            Piece(
                tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), tuple(tensor.local_shape)
            )
            for tensor in tensors
        ]
        first = pieces[name][0].shape
        shapes[name] = (sum(piece.shape[0] for piece in pieces[name]), *first[1:])
        dtypes[name] = tensors[0].dtype
    return Blueprint(shapes, dtypes, pieces, objects)


def build(config: MSAModelConfig) -> GPTModel:
    """The model on one rank, or on this rank of the existing process groups."""
    return MSAModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def seed(value: int = 1) -> None:
    """Megatron's random states, which building a model asks for."""
    torch.manual_seed(value)
    model_parallel_cuda_manual_seed(value, force_reset_rng=True)


def _built(entry: Any) -> list[ShardedTensor]:
    """A factory cuts gate and up projections apart, so that each can be sharded."""
    assert isinstance(entry, ShardedTensorFactory), type(entry)
    built = entry.build()
    tensors = list(built.values()) if isinstance(built, dict) else list(built)
    assert all(isinstance(tensor, ShardedTensor) for tensor in tensors)
    return tensors
