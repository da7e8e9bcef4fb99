"""Picture files -> normalised patches at native resolution.

As the processors of Qwen2-VL and MiniMax-M3 in transformers do it on a CPU: sides are rounded to multiples of
patch x merge, the area is kept between two limits, resizing is bicubic on 8-bit pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import patchify

_MODES = {1: "L", 3: "RGB"}
_LONGEST_SIDE = 200  # times the shorter one, as in those processors

_ORIENTATION = 0x0112
"""EXIF tag: how the pixels must be turned to be seen upright."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LIES = (5, 6, 7, 8)
"""Orientations that exchange height and width."""


class ImageError(ValueError):
    """An image that cannot be used."""


@dataclass(frozen=True)
class ImageSettings:
    """How images become patches."""

    patch: int
    temporal_patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def build(cls, data: MultimodalDataConfig, vision: VisionConfig) -> ImageSettings:
        """From the two groups of flags.

        Raises:
            ConfigError: they do not fit.
        """
        channels = vision.vision_num_channels
        if channels not in _MODES:
            raise ConfigError(
                f"--vision-num-channels is {channels}; images are read with 1 channel (grey) or 3 (RGB)"
            )
        for name, values in (
            ("--multimodal-image-mean", data.multimodal_image_mean),
            ("--multimodal-image-std", data.multimodal_image_std),
        ):
            if len(values) != channels:
                raise ConfigError(
                    f"{name} has {len(values)} values, but --vision-num-channels is {channels}; give one for "
                    "each"
                )
        settings = cls(
            patch=vision.vision_patch_size,
            temporal_patch=vision.vision_temporal_patch_size,
            merge=vision.vision_merge_size,
            min_pixels=data.multimodal_min_pixels,
            max_pixels=data.multimodal_max_pixels,
            mean=tuple(data.multimodal_image_mean),
            std=tuple(data.multimodal_image_std),
        )
        if settings.max_pixels < settings.unit**2:
            raise ConfigError(
                f"--multimodal-max-pixels is {settings.max_pixels}, less than the {settings.unit} x "
                f"{settings.unit} pixels of one token (--vision-patch-size times --vision-merge-size)"
            )
        return settings

    @property
    def unit(self) -> int:
        """Pixels along each side of what becomes one token."""
        return self.patch * self.merge

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image is resized to: both sides multiples of `unit`, the area within the limits.

        Raises:
            ImageError: it is too long and narrow.
        """
        if max(height, width) > _LONGEST_SIDE * min(height, width):
            raise ImageError(
                f"it has {height} x {width} pixels (height x width); the longer side may be at most "
                f"{_LONGEST_SIDE} times the shorter one"
            )
        unit = self.unit
        new = tuple(round(side / unit) * unit for side in (height, width))
        if new[0] * new[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new = tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        elif new[0] * new[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new = tuple(math.ceil(side * grow / unit) * unit for side in (height, width))
        # With limits below one token a side may have been rounded to nothing.
        return max(unit, new[0]), max(unit, new[1])

    def grid(self, files: Sequence[bytes]) -> tuple[int, int, int]:
        """Patches along time, height and width of a visual, from the headers of its files.

        Raises:
            ImageError: a file is no image, or the frames differ in size.
        """
        sizes = {size_of(file) for file in files}
        if len(sizes) > 1:
            shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise ImageError(f"the frames of a video differ in size (height x width): {shown}")
        height, width = self.resized(*sizes.pop())
        return -(-len(files) // self.temporal_patch), height // self.patch, width // self.patch

    def patches(self, files: Sequence[bytes]) -> tuple[Tensor, tuple[int, int, int]]:
        """The patches of a visual: float32 [t * h * w, values of a patch], and the grid (t, h, w).

        Raises:
            ImageError: a file cannot be decoded.
        """
        frames = torch.stack([self._pixels(file) for file in files])
        return patchify(frames, patch=self.patch, temporal_patch=self.temporal_patch, merge=self.merge)

    def _pixels(self, file: bytes) -> Tensor:
        """Normalised, [channels, height, width]."""
        image = decoded(file, _MODES[len(self.mean)])
        height, width = self.resized(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(image)).reshape(height, width, -1).float() / 255
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)


def size_of(file: bytes) -> tuple[int, int]:
    """Height and width in pixels of the upright image; reads the header only.

    Raises:
        ImageError: the file is no image.
    """
    with _open(file) as image:
        if _orientation(image) in _LIES:
            return image.width, image.height
        return image.height, image.width


def decoded(file: bytes, mode: str = "RGB") -> Image.Image:
    """The whole image, upright, 8 bits a channel.

    Args:
        file: of the image.
        mode: Pillow's name of the channels.

    Raises:
        ImageError: it cannot be decoded.
    """
    with _open(file) as image:
        orientation = _orientation(image)  # the header's, as `size_of` sees it
        try:
            converted = _eight_bits(image).convert(mode)
        except Exception as error:  # as below
            raise ImageError(f"an image is corrupt: {error}") from error
    turn = _TURNS.get(orientation)
    return converted if turn is None else converted.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits in 8; Pillow's own conversion cuts all values above 255 off."""
    # Pillow reads 16 bits as "I;16", but those of a PGM file as 32.
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        return image
    values = numpy.asarray(image).astype(numpy.float32) / 257
    return Image.fromarray(values.round().astype(numpy.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation as the header gives it: 1 (upright) to 8; 1 where there is none."""
    if image.format == "TIFF":  # Pillow turns them itself
        return 1
    try:
        # Not `image.getexif()`: that of PNG files decodes the image to look for EXIF data behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # EXIF data that cannot be read make no image unusable
        return 1


def _open(file: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Above 90 million pixels Pillow warns of a bomb, and above twice that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(file))
    except Exception as error:  # Pillow and its libraries raise errors of any kind for what they cannot read
        raise ImageError(f"a file of {len(file)} bytes is no image that can be read: {error}") from error
