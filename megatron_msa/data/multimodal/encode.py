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
        tokens: int64 [n + 1], with placeholders and what begins and ends a document; n positions.
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
        self._begin, self._end = special_tokens_around(tokenizer)

    def measure(self, sample: Sample) -> Measured:
        """Token ids with one placeholder for each merged patch.

        Raises:
            SampleError: an image is not one or does not fit, the text holds placeholder tokens, or the sample
                is longer than a sequence.
        """
        vision = self._vision
        tokens = [*self._begin]
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
        if len(tokens) == len(self._begin):
            raise SampleError(sample.key, "has neither text nor images")
        tokens += self._end
        if tokens[-1] != self._tokenizer.eod:
            tokens.append(self._tokenizer.eod)
        if len(tokens) < 2:
            raise SampleError(sample.key, "has nothing but the end-of-document token")
        if len(tokens) > self.seq_length + 1:
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
            if decoded_grid != grid:
                raise SampleError(
                    measured.key,
                    f"visual {number + 1} has other sizes in its header than in its pixels: {grid} and "
                    f"{decoded_grid} patches (time, height, width)",
                )
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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SampleError(key, f"its text is no Unicode: {error}") from error
        ids = plain_tokens(self._tokenizer, text) if text else []
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


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text and nothing else.

    Args:
        tokenizer: Megatron's. Those of Hugging Face models put what marks the beginning and end of a document
            (BOS, EOS) around every text that they are given, unless
            --tokenizer-hf-no-include-special-tokens tells Megatron otherwise.
        text: to tokenize.
    """
    library = getattr(tokenizer, "_tokenizer", None)
    if library is not None and getattr(library, "include_special_tokens", False):
        return list(library.tokenizer(text, add_special_tokens=False).input_ids)
    return [int(token) for token in tokenizer.tokenize(text)]


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text of its own accord."""
    library = getattr(tokenizer, "_tokenizer", None)
    if not getattr(library, "include_special_tokens", False):
        return [], []
    probe = "a"
    plain, whole = plain_tokens(tokenizer, probe), list(tokenizer.tokenize(probe))
    start = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def grid_tensor(grids: tuple[tuple[int, int, int], ...]) -> Tensor:
    """int64 [visuals, 3]."""
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
