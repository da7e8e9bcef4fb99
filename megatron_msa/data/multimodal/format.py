"""What a multimodal sample is.

In a WebDataset shard (a tar file) the files of one sample follow each other and share their name up to the
first dot, the sample's key:

    page17.json        {"content": [...]}: the pieces in the order in which they are read
    page17.0.jpg       files that the pieces name, by what follows the key: "0.jpg"
    page17.clip.1.png

A piece is one of

    {"type": "text",  "text": "A cat "}
    {"type": "image", "file": "0.jpg"}
    {"type": "video", "files": ["clip.0.png", "clip.1.png"]}         frames, in order

Any number of pieces in any order; every file is named exactly once. Files are images that Pillow reads. A
text is tokenized by itself, so whatever a model wants around its images (start and end tokens) stands in the
texts beside them. Placeholder tokens do not: they are inserted for each image and video. The sample begins
and ends as a document of text does: with the tokenizer's BOS if it gives one, and the end-of-document token.

A dataset is a folder of shards with Energon's index in `.nv-meta`, as `energon prepare` or `write_dataset`
makes it, with the parts `train`, `val` and `test`.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_msa.errors import ConfigError

_DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


class SampleError(ValueError):
    """A sample that cannot be used; the message begins with its key."""

    def __init__(self, key: str, what: str) -> None:
        # One argument: a DataLoader worker hands exceptions over by their message.
        super().__init__(f"sample {key}: {what}")


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Visual:
    """An image (one file) or a video (its frames)."""

    files: tuple[bytes, ...]
    is_video: bool = False


@dataclass(frozen=True)
class Sample:
    """One document: pieces of text, images and videos in reading order."""

    key: str
    pieces: tuple[Text | Visual, ...]


def parse(key: str, members: Mapping[str, bytes]) -> Sample:
    """A sample from the files of a shard.

    Args:
        key: of the sample.
        members: contents of its files by what follows the key, "json" among them.

    Raises:
        SampleError: not the format described above.
    """
    if "json" not in members:
        raise SampleError(key, f"has no .json file, only {', '.join(sorted(members)) or 'none at all'}")
    try:
        content = json.loads(members["json"])["content"]
        if not isinstance(content, list):
            raise TypeError("content is no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(
            key, f'its .json file is no object with a list "content" ({type(error).__name__}: {error})'
        ) from error
    left = {name: data for name, data in members.items() if name != "json"}

    def take(name: str) -> bytes:
        if name not in left:
            again = "twice" if name in members else "which the shard does not have"
            raise SampleError(key, f"a piece names the file {name!r} {again}")
        return left.pop(name)

    pieces: list[Text | Visual] = []
    for number, piece in enumerate(content):
        match piece:
            case {"type": "text", "text": str(text)}:
                pieces.append(Text(text))
            case {"type": "image", "file": str(name)}:
                pieces.append(Visual((take(name),)))
            case {"type": "video", "files": [_, *_] as names} if all(isinstance(each, str) for each in names):
                pieces.append(Visual(tuple(take(name) for name in names), is_video=True))
            case _:
                raise SampleError(key, f"piece {number} is not text, image or video as documented: {piece!r}")
    if left:
        raise SampleError(key, f"no piece names the files {', '.join(sorted(left))}")
    if not pieces:
        raise SampleError(key, "has no piece")
    return Sample(key, tuple(pieces))


def members_of(sample: Sample, suffix: str = "png") -> dict[str, bytes]:
    """The files of a sample by what follows its key; the inverse of `parse`.

    Args:
        sample: the sample.
        suffix: of the names of its image files.
    """
    content: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for piece in sample.pieces:
        if isinstance(piece, Text):
            content.append({"type": "text", "text": piece.text})
            continue
        names = [f"{len(files) + number}.{suffix}" for number in range(len(piece.files))]
        files |= dict(zip(names, piece.files, strict=True))
        content.append(
            {"type": "video", "files": names} if piece.is_video else {"type": "image", "file": names[0]}
        )
    return {"json": json.dumps({"content": content}, ensure_ascii=False).encode()} | files


def write_dataset(
    folder: str | Path,
    parts: Mapping[str, Iterable[Sample]],
    *,
    samples_per_shard: int = 1000,
    suffix: str = "png",
) -> Path:
    """Write shards and Energon's index.

    Args:
        folder: where to; must not exist or be empty.
        parts: samples of "train", "val", "test"; keys are unique over all of them.
        samples_per_shard: samples in a shard; a few shards for each data-parallel rank and worker are best.
        suffix: of the names of image files.

    Raises:
        ConfigError: the folder is not empty, a part has no sample, or a key is used twice.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[str]] = {}
    keys: set[str] = set()
    for part, samples in parts.items():
        shards[part] = []
        tar = None
        for number, sample in enumerate(samples):
            if sample.key in keys or not sample.key or "." in sample.key or "/" in sample.key:
                raise ConfigError(
                    f"{sample.key!r} is no key: it must be unique and hold neither a dot nor a slash"
                )
            keys.add(sample.key)
            if number % samples_per_shard == 0:
                if tar is not None:
                    tar.close()
                shards[part].append(f"{part}-{number // samples_per_shard:06d}.tar")
                tar = tarfile.open(folder / shards[part][-1], "w")  # noqa: SIM115
            assert tar is not None
            _add(tar, sample.key, members_of(sample, suffix))
        if tar is None:
            raise ConfigError(f"there is no sample for the part {part!r} of {folder}")
        tar.close()
    write_index(folder, shards)
    return folder


def write_index(folder: Path, shards: Mapping[str, Sequence[str]]) -> None:
    """Let Energon index the shards of each part; what `energon prepare` does in a dialogue."""
    import contextlib

    from megatron.energon.flavors import BaseWebdatasetFactory

    with contextlib.redirect_stdout(io.StringIO()):  # it reports what it writes
        BaseWebdatasetFactory.prepare_dataset(
            folder,
            [name for names in shards.values() for name in names],
            split_parts_patterns=[(part, f"{part}-.*") for part in shards],
            workers=1,
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET_YAML, encoding="utf-8")


def _add(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    for name, data in members.items():
        entry = tarfile.TarInfo(f"{key}.{name}")  # without times and owners: the same samples, the same bytes
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
