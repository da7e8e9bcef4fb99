"""Reading and writing safetensors files piece by piece, so that no file is ever in memory as a whole.

Format (github.com/huggingface/safetensors): eight bytes with the length of the header, little endian; the
header, JSON of name -> {dtype, shape, data_offsets}; the data, row-major, without gaps. The library maps
files into memory and writes whole files from tensors in memory; here every tensor, or every row of a
stacked one, is one read or write of its bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_msa.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a tensor is, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    """Of the first byte, from the start of the file."""
    info: TensorInfo


class SafetensorsReader:
    """The tensors of a model folder: one file, or shards with an index.

    Args:
        folder: with ``model.safetensors.index.json`` or ``model.safetensors``.
        spelled: turns a name in the files into the one it is known by here.

    Raises:
        ConfigError: no weights, a missing shard, a truncated or damaged file, an index that does not fit.
    """

    def __init__(self, folder: Path, spelled: Callable[[str], str] = str) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        for path, wanted in _shards(folder).items():
            found = _read_header(path)
            if wanted is not None and wanted != found.keys():
                absent = sorted(wanted - found.keys())
                unlisted = sorted(found.keys() - wanted)
                raise ConfigError(
                    f"{path} does not fit {folder / INDEX_NAME}: "
                    + (f"{absent[0]} and {len(absent) - 1} more are not in it" if absent else "")
                    + (f"{unlisted[0]} is in it but not in the index" if unlisted and not absent else "")
                    + "; download the model again"
                )
            self._places |= {spelled(name): place for name, place in found.items()}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: place.info for name, place in self._places.items()}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or with ``index`` one entry of its first dimension; only those bytes are read."""
        path, offset, info = self._places[name].path, self._places[name].offset, self._places[name].info
        if index is not None:
            info = TensorInfo(info.shape[1:], info.dtype)
            offset += index * info.nbytes
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.nbytes:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                if _read_into(file, _bytes_of(tensor)) != info.nbytes:
                    raise ConfigError(f"{path} ended while {name} was read; download the model again")
        return tensor


class SafetensorsWriter:
    """Writes tensors, in the order given, into shards of at most ``max_shard_bytes`` and an index.

    Args:
        folder: an existing folder.
        tensors: name -> what will be written, all of it known beforehand: headers come first.
        max_shard_bytes: of data; a larger tensor has a shard of its own.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], max_shard_bytes: int) -> None:
        self.folder = folder
        self.tensors = tensors
        self.shards = _split(tensors, max_shard_bytes)

    def write(self, load: Callable[[str], Iterable[Tensor]]) -> None:
        """Write everything; ``load`` yields the pieces of a tensor in the order of their bytes.

        Raises:
            ValueError: the pieces are not the announced tensor.
        """
        names = [SINGLE_NAME]
        if len(self.shards) > 1:
            total = len(self.shards)
            names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        for file_name, shard in zip(names, self.shards, strict=True):
            with (self.folder / file_name).open("wb") as file:
                file.write(_header({name: self.tensors[name] for name in shard}))
                for name in shard:
                    info, written = self.tensors[name], 0
                    for piece in load(name):
                        if piece.dtype != info.dtype:
                            raise ValueError(f"{name}: announced as {info.dtype}, got {piece.dtype}")
                        if piece.numel():
                            written += file.write(_bytes_of(piece.contiguous()))
                    if written != info.nbytes:
                        raise ValueError(f"{name}: announced with {info.nbytes} bytes, got {written}")
        if len(self.shards) > 1:
            weight_map = {
                name: file_name for file_name, shard in zip(names, self.shards, strict=True) for name in shard
            }
            metadata = {
                "total_parameters": sum(math.prod(info.shape) for info in self.tensors.values()),
                "total_size": sum(info.nbytes for info in self.tensors.values()),
            }
            text = json.dumps(
                {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2
            )
            (self.folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """File -> the tensors that the index expects in it (None without an index)."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return {folder / SINGLE_NAME: None}
        raise ConfigError(
            f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; --load takes the folder of a model in "
            "safetensors format"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str] | None] = {}
        for name, file_name in weight_map.items():
            names = shards.setdefault(folder / file_name, set())
            assert names is not None
            names.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} cannot be read ({error!r}); download the model again") from error
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards that its index names: "
            f"{', '.join(sorted(missing)[:3])}; complete the download"
        )
    return shards


def _read_header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise ConfigError(
                    f"{path} is truncated or damaged: its header does not fit into {size} bytes"
                )
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        places = {}
        for name, entry in entries.items():
            if entry["dtype"] not in _DTYPES:
                raise ConfigError(f"{path}: {name} has type {entry['dtype']}, known are {', '.join(_DTYPES)}")
            info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            if end - start != info.nbytes:
                raise ConfigError(f"{path} is damaged: the extent of {name} is not that of its shape")
            places[name] = _Place(path, 8 + length + start, info)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a safetensors file or is damaged ({error})") from error
    end = max((place.offset + place.info.nbytes for place in places.values()), default=8 + length)
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise ConfigError(f"{path} is {state}: it has {size} bytes, its header describes {end}")
    return places


def _header(tensors: dict[str, TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def _split(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _read_into(file: object, buffer: memoryview) -> int:
    """A single read returns at most 2 GiB."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done
