"""Samples from the digit photographs that come with scikit-learn: 1,797 images of 8 x 8 pixels.

- A caption: an image and the digit it shows.
- A document: several images of different digits in a long text, each before its letter, and questions which
  letter stands behind which digit.
"""

from __future__ import annotations

import io
import random
import string
from dataclasses import dataclass

from PIL import Image
from sklearn.datasets import load_digits

from megatron_msa.data.multimodal.format import Sample, Text, Visual
from megatron_msa.evaluation.multimodal import needle_sample

IMAGE_TOKEN = "<|image|>"
WORDS = ["the", "of", "to", "in", "and", "it", "on", "as", "for", "was", "with", "by", "from", "or"]


@dataclass(frozen=True)
class Digit:
    """A photograph as a PNG file, and what it shows."""

    image: bytes
    name: str


def digits() -> tuple[list[Digit], list[Digit]]:
    """For training, and held out: the last 297, which other people wrote."""
    data = load_digits()
    found = [Digit(_png(pixels), str(label)) for pixels, label in zip(data.images, data.target, strict=True)]
    return found[:1500], found[1500:]


def caption(key: str, digit: Digit) -> Sample:
    """`[image] = 7`."""
    return Sample(key, (Visual((digit.image,)), Text(f" = {digit.name}")))


def document(
    key: str, found: dict[str, list[Digit]], rng: random.Random, *, images: int, words: int, questions: int
) -> Sample:
    """Images of different digits, and questions about any of them, also twice about the same.

    Args:
        key: of the sample.
        found: photographs of each digit.
        rng: chooses.
        images: at most 10.
        words: behind each image.
        questions: at the end.
    """
    names = rng.sample(sorted(found), images)
    objects = [(name, rng.choice(found[name]).image) for name in names]
    fillers = [" ".join(rng.choices(WORDS, k=words)) for _ in objects]
    return needle_sample(key, objects, fillers, asked=rng.choices(names, k=questions))


def by_name(found: list[Digit]) -> dict[str, list[Digit]]:
    """The photographs of each digit."""
    return {name: [digit for digit in found if digit.name == name] for name in string.digits}


def _png(pixels: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels * 255 / 16).astype("uint8")).save(file, "PNG")
    return file.getvalue()
