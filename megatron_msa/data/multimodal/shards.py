"""The shards of a dataset, checked before a run starts: a missing one must not stop it hours later."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX
from megatron.energon.flavors.webdataset.structs import ShardInfo
from megatron.energon.metadataset import load_dataset

from megatron_msa.errors import ConfigError


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
    with index.open("rb") as stream:
        stream.seek(max(0, index.size() - 8))
        (end,) = struct.unpack("Q", stream.read(8))
    if path.size() < end:
        raise ConfigError(
            f"the shard {path} has {path.size()} bytes, but its samples reach to byte {end}: it is cut "
            "short. Copy it again, or run `energon prepare` again"
        )
