"""Megatron's distributed checkpoint (torch_dist), written and read tensor by tensor in one process.

Megatron's own save takes the whole state in memory. The format is that of torch.distributed.checkpoint with
two additions: the "common state" (arguments and the like) is an object called ``common_state``, and a file
``metadata.json`` names the backend and marks the checkpoint as complete.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    ReadItem,
    SavePlan,
    load,
    save,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_msa.errors import ConfigError

COMMON_STATE_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
_FILE_BYTES = 4 * 2**30
"""Size at which the next file is begun: loading ranks read files side by side."""


class Chunk(NamedTuple):
    """A part of a global tensor, loaded when it is written."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Returns ``shape``; called once, in the order of the chunks."""


def write_checkpoint(
    folder: Path, chunks: Iterable[Chunk], objects: dict[str, Any], common_state: dict[str, Any]
) -> None:
    """Write a checkpoint that Megatron loads at any parallel layout.

    Args:
        folder: does not exist yet.
        chunks: together they cover every global tensor once.
        objects: key -> object, for states that are not tensors.
        common_state: arguments, iteration and whatever else all ranks share.
    """
    everything = {key: [data] for key, data in objects.items()} | {COMMON_STATE_KEY: [common_state]}
    planner = _StreamingPlanner(list(chunks), everything)
    save({}, storage_writer=_StreamingWriter(folder), planner=planner, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class DistributedCheckpoint:
    """A checkpoint on disk, read a tensor, or a part of one, at a time.

    Raises:
        ConfigError: it is not a complete torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            if not (folder / "metadata.json").is_file():
                raise FileNotFoundError(f"{folder / 'metadata.json'} does not exist")
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self.check_files()
            self.common_state: dict[str, Any] = load_common_state_dict(str(folder))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{folder} is not a complete torch_dist checkpoint ({type(error).__name__}: {error})"
            ) from error
        tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in tensors.items()}

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A part of a tensor. Memory: the part, and one stored chunk at a time.

        Raises:
            ConfigError: the files are damaged.
        """
        entry = self._metadata.state_dict_metadata[key]
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        result = torch.empty(shape, dtype=self.dtypes[key])
        if sum(item.lengths.numel() for item in items) != result.numel():
            raise ConfigError(f"{self.folder} does not hold all of {key}")
        try:
            self._reader.read_data(LoadPlan(items), _PartPlanner(result)).wait()
        except Exception as error:
            raise ConfigError(
                f"{key} cannot be read from {self.folder} ({type(error).__name__}: {error})"
            ) from error
        return result

    def chunks(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and shape of the parts that a tensor is stored in."""
        stored = self._metadata.state_dict_metadata[key].chunks
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored]

    def objects(self) -> list[str]:
        """Names of what is not a tensor, without the common state."""
        return [
            name
            for name, entry in self._metadata.state_dict_metadata.items()
            if not isinstance(entry, TensorStorageMetadata) and name != COMMON_STATE_KEY
        ]

    def read_object(self, name: str) -> Any:
        """One of `objects`."""
        state: dict[str, Any] = {name: None}
        load(state, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return state[name][0]

    def check_files(self) -> None:
        """Refuse files that end before what the metadata says they hold.

        Raises:
            ConfigError: names the file.
        """
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                state = "truncated" if size else "missing or empty"
                raise ConfigError(f"{path} is {state}: {size:,} bytes of at least {end:,}")


class _PartPlanner(DefaultLoadPlanner):
    """Gives out the places in one tensor that stored chunks are copied to."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class _StreamingPlanner(DefaultSavePlanner):
    """A plan made of chunks whose data is loaded when its turn comes."""

    def __init__(self, chunks: list[Chunk], objects: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(chunk.key, torch.Size(chunk.offset)): chunk for chunk in chunks}
        assert len(self._chunks) == len(chunks), "two chunks for one place"
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        for index, chunk in self._chunks.items():
            place = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
            properties = TensorProperties(dtype=chunk.dtype)
            data = TensorWriteData(chunk=place, properties=properties, size=torch.Size(chunk.global_shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], buffer)
            return buffer
        chunk = self._chunks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = chunk.load().reshape(chunk.shape)
        assert tensor.dtype == chunk.dtype, f"{chunk.key}: announced as {chunk.dtype}, got {tensor.dtype}"
        return tensor


class _StreamingWriter(FileSystemWriter):
    """Torch's own writer keeps every tensor of a file until the file is closed."""

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        pending = deque(plan.items)
        number = 0
        while pending:
            name = f"__0_{number}.distcp"
            number += 1
            with (Path(self.path) / name).open("wb") as file:
                while pending and (file.tell() == 0 or file.tell() < _FILE_BYTES):
                    results.append(_write_item(file, name, pending.popleft(), planner))
                file.flush()
                os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _write_item(file: Any, name: str, item: WriteItem, planner: Any) -> WriteResult:
    start = file.tell()
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        # A view would be saved with all of what it is a view of.
        torch.save(data if data.untyped_storage().nbytes() == data.nbytes else data.clone(), file)
    length = file.tell() - start
    return WriteResult(item.index, length, _StorageInfo(name, start, length))
