"""The shards of a dataset, checked before a run starts: a missing one must not stop it hours later."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX
from megatron.energon.flavors.webdataset.itar_reader import ITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.metadataset import load_dataset

from megatron_msa.errors import ConfigError

_OFFSET = 8
"""Bytes of an offset in the index of a shard."""


@dataclass(frozen=True)
class Shard:
    """A tar file of samples."""

    name: str
    samples: int


def list_shards(path: str, part: str) -> list[Shard]:
    """The shards of one part of a dataset, or of all datasets of a metadataset.

    Raises:
        ConfigError: no such data or part, or a shard that is missing or cut short.
    """
    shards = _shards(path, part)
    for shard in shards:
        _check(shard.path)
    return [Shard(shard.name, shard.count) for shard in shards]


def has_part(path: str, part: str) -> bool:
    """Whether a dataset has a part of this name."""
    try:
        return bool(_shards(path, part))
    except ConfigError:
        return False


@contextlib.contextmanager
def energon_refusals(path: str, part: str) -> Iterator[None]:
    """Energon reports data that it cannot use with assertions and errors of many kinds."""
    try:
        yield
    except ConfigError:
        raise
    except (AssertionError, ValueError, OSError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--multimodal-data-path {path} has no part {part!r} that Energon can read "
            f"({type(error).__name__}: {' '.join(str(error).split())}). It takes a folder of WebDataset "
            "shards with the index that `energon prepare` writes, or a metadataset (.yaml)"
        ) from error


def name_shards_in_errors() -> None:
    """Let what goes wrong within a shard name it. Energon's reader passes on what tarfile says of the bytes.

    Raises, from then on wherever a sample is read:
        ConfigError: the shard and the byte.
    """
    read = ITarReader._get_item_by_sample_pointer
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def named(self: ITarReader, sample_pointer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(self, sample_pointer, *args, **kwargs)
        except Exception as error:
            raise ConfigError(
                f"the shard {self.tar_filepaths[sample_pointer.tar_file_id]} cannot be read at byte "
                f"{sample_pointer.byte_offset}, where its index says that a sample begins "
                f"({type(error).__name__}: {error}). Copy it again, or run `energon prepare` again"
            ) from error

    ITarReader._get_item_by_sample_pointer = named


def _shards(path: str, part: str) -> list[ShardInfo]:
    if not Path(path).exists() and "://" not in path:
        raise ConfigError(f"--multimodal-data-path {path} does not exist")
    with energon_refusals(path, part):
        loaded = load_dataset(path).get_datasets(
            training=part == "train",
            split_part=part,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            decoder=None,
        )
    return [shard for each in loaded.datasets for shard in each.dataset.shards]


def _check(path: EPath) -> None:
    index = path.with_suffix(ITAR_SUFFIX)
    if not path.is_file():
        raise ConfigError(f"the shard {path} does not exist, but the index of its dataset names it")
    if not index.is_file():
        raise ConfigError(f"the index {index} of a shard does not exist; run `energon prepare` again")
    if index.size() < _OFFSET or index.size() % _OFFSET:
        raise ConfigError(
            f"the index {index} of a shard has {index.size()} bytes, but holds offsets of {_OFFSET} bytes: "
            "it is cut short. Run `energon prepare` again"
        )
    with index.open("rb") as stream:
        stream.seek(index.size() - _OFFSET)
        (end,) = struct.unpack("Q", stream.read(_OFFSET))
    if path.size() < end:
        raise ConfigError(
            f"the shard {path} has {path.size()} bytes, but its samples reach to byte {end}: it is cut "
            "short. Copy it again, or run `energon prepare` again"
        )
