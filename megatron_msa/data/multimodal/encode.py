"""A sample -> token ids with placeholders, and the patches that belong to them, in two steps.

`measure` needs the headers of the images only: it says how long the sample is, which is all that packing must
know. `decode` reads the pixels, once a sample has its place in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_msa.data.multimodal.format import Sample, SampleError, Text
from megatron_msa.data.multimodal.images import ImageError, ImageSettings
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import check_fits


@dataclass(frozen=True)
class Measured:
    """A sample whose length is known.

    Attributes:
        tokens: int64 [n + 1], with placeholders and the end-of-document token: n positions of a sequence.
        grids: patches along time, height and width of each visual.
        files: the files of each visual, not decoded.
    """

    key: str
    tokens: numpy.ndarray
    grids: tuple[tuple[int, int, int], ...]
    files: tuple[tuple[bytes, ...], ...]

    @property
    def length(self) -> int:
        """Positions that it takes in a sequence."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Document:
    """A sample as a sequence takes it.

    Attributes:
        tokens: int64 [n + 1].
        grid_thw: int64 [visuals, 3].
        patches: float32 [patches, values of a patch]; None where pixels are not needed.
    """

    key: str
    tokens: numpy.ndarray
    grid_thw: Tensor
    patches: Tensor | None


class SampleEncoder:
    """Encodes samples for a model.

    Args:
        tokenizer: Megatron's, with an end-of-document token.
        images: how images become patches.
        vision: the placeholder tokens.
        seq_length: tokens of a sequence, which a sample must fit into.
    """

    def __init__(
        self, tokenizer: Any, images: ImageSettings, vision: VisionConfig, *, seq_length: int
    ) -> None:
        if tokenizer.eod is None:
            raise ConfigError(
                "the tokenizer has no end-of-document (eos) token, which ends each multimodal sample; add one"
            )
        if vision.vision_image_token_id is None:
            raise ConfigError(
                "--vision-image-token-id is missing: which token of the vocabulary stands where an image is"
            )
        self.images = images
        self.seq_length = seq_length
        self._tokenizer = tokenizer
        self._vision = vision

    def measure(self, sample: Sample) -> Measured:
        """Token ids with one placeholder for each merged patch.

        Raises:
            SampleError: an image is not one or does not fit, the text holds placeholder tokens, or the sample
                is longer than a sequence.
        """
        vision = self._vision
        tokens: list[int] = []
        grids: list[tuple[int, int, int]] = []
        files: list[tuple[bytes, ...]] = []
        for piece in sample.pieces:
            if isinstance(piece, Text):
                tokens += self._text(sample.key, piece.text)
                continue
            try:
                grid = self.images.grid(piece.files)
                count = check_fits(grid, self.images.merge, self.seq_length)
            except (ImageError, ConfigError) as error:
                what = "video" if piece.is_video else "image"
                raise SampleError(sample.key, f"{what} {len(grids) + 1}: {error}") from error
            placeholder = vision.vision_image_token_id
            if piece.is_video and vision.vision_video_token_id is not None:
                placeholder = vision.vision_video_token_id
            assert placeholder is not None
            tokens += [placeholder] * count
            grids.append(grid)
            files.append(piece.files)
        if tokens[-1:] != [self._tokenizer.eod]:
            tokens.append(self._tokenizer.eod)
        if not 2 <= len(tokens) <= self.seq_length + 1:
            if len(tokens) < 2:
                raise SampleError(sample.key, "has neither text nor images")
            raise SampleError(
                sample.key,
                f"has {len(tokens) - 1} tokens, but a sequence has {self.seq_length} (--seq-length): split "
                "it, or make its images smaller with --multimodal-max-pixels",
            )
        return Measured(sample.key, numpy.array(tokens, dtype=numpy.int64), tuple(grids), tuple(files))

    def decode(self, measured: Measured) -> Document:
        """The patches of the sample's images.

        Raises:
            SampleError: an image is corrupt.
        """
        patches = []
        for number, (files, grid) in enumerate(zip(measured.files, measured.grids, strict=True)):
            try:
                visual, decoded_grid = self.images.patches(files)
            except ImageError as error:
                raise SampleError(measured.key, f"visual {number + 1}: {error}") from error
            assert decoded_grid == grid
            patches.append(visual)
        return Document(
            measured.key,
            measured.tokens,
            grid_tensor(measured.grids),
            torch.cat(patches) if patches else None,
        )

    def without_pixels(self, measured: Measured) -> Document:
        """The sample for a rank that needs no pixels; nothing is decoded."""
        return Document(measured.key, measured.tokens, grid_tensor(measured.grids), None)

    def _text(self, key: str, text: str) -> list[int]:
        ids = [int(token) for token in self._tokenizer.tokenize(text)] if text else []
        if ids and (min(ids) < 0 or max(ids) >= self._tokenizer.vocab_size):
            raise SampleError(key, f"the tokenizer gave ids outside its {self._tokenizer.vocab_size}")
        found = sum(token in self._vision.placeholder_ids for token in ids)
        if found:
            raise SampleError(
                key,
                f"its text holds {found} placeholder tokens ({self._vision.placeholder_ids}) besides those "
                "of its images; images and videos are pieces of their own",
            )
        return ids


def grid_tensor(grids: tuple[tuple[int, int, int], ...]) -> Tensor:
    """int64 [visuals, 3]."""
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
