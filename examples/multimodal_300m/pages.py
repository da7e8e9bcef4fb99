"""Pages of text and photographs, from what Python packages bring along.

Photographs: those in the wheels of scikit-learn, matplotlib and, where it is installed, scikit-image, 17 in
all. An image is a part of one, of any size and aspect. Behind it stands a caption that says what the pixels
show: the subject, how much of it and which part, the mean colour and the brightness. Between the images stand
docstrings of Python's standard library.
"""

from __future__ import annotations

import ast
import colorsys
import importlib.util
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageStat

from megatron_msa.data.corpus import builtin_files
from megatron_msa.data.multimodal.format import Sample, Text, Visual

PHOTOGRAPHS = {
    "sklearn/datasets/images": {"china.jpg": "a pagoda by a lake", "flower.jpg": "a dahlia"},
    "matplotlib/mpl-data/sample_data": {"grace_hopper.jpg": "an officer in uniform"},
    "skimage/data": {
        "astronaut.png": "an astronaut",
        "brick.png": "a wall of bricks",
        "camera.png": "a man with a camera",
        "chelsea.png": "a tabby cat",
        "coffee.png": "a cup of coffee",
        "coins.png": "old coins",
        "grass.png": "grass",
        "gravel.png": "gravel",
        "hubble_deep_field.jpg": "distant galaxies",
        "ihc.png": "stained cells",
        "moon.png": "the surface of the moon",
        "motorcycle_left.png": "a motorcycle",
        "retina.jpg": "the back of an eye",
        "rocket.jpg": "a rocket at its launch",
    },
}
"""Subjects by file, by the folder in which a package has them."""

_VIEWS = {"all": 1.0, "half": 0.6, "a detail": 0.4}
_COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "violet", "pink")
_LEAST, _MOST = 80, 240
"""Characters of a docstring that is used."""


@dataclass(frozen=True)
class Photograph:
    """A photograph and what it shows."""

    subject: str
    image: Image.Image


def photographs() -> list[Photograph]:
    """Those of the installed packages."""
    found = []
    for folder, files in PHOTOGRAPHS.items():
        package, _, rest = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for name, subject in files.items():
            file = Path(spec.origin).parent / rest / name
            if file.exists():
                with Image.open(file) as image:
                    found.append(Photograph(subject, image.convert("RGB")))
    return found


def paragraphs(most: int = 2000) -> list[str]:
    """First paragraphs of docstrings in Python's standard library."""
    found: list[str] = []
    for file in builtin_files():
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if _LEAST <= len(text) <= _MOST:
                    found.append(text)
        if len(found) >= most:
            break
    return found[:most]


@dataclass(frozen=True)
class PageWriter:
    """Makes samples.

    Attributes:
        found: photographs to take parts of.
        texts: paragraphs to put between them.
        sides: least and most pixels along a side of an image.
        images: least and most images of a page.
    """

    found: list[Photograph]
    texts: list[str]
    sides: tuple[int, int]
    images: tuple[int, int]

    def pages(self, name: str, count: int, rng: random.Random, *, torn_every: int = 0) -> Iterator[Sample]:
        """Pages of several images of any size; of every so many, one has an image whose file is cut short."""
        for number in range(count):
            pieces: list[Text | Visual] = []
            for _ in range(rng.randint(*self.images)):
                size = rng.randint(*self.sides), rng.randint(*self.sides)
                file, caption = self._image(size, rng)
                pieces += [Text(f"{rng.choice(self.texts)}\n"), Visual((file,)), Text(f"{caption}\n\n")]
            if torn_every and number % torn_every == torn_every - 1:
                whole = pieces[-2]
                assert isinstance(whole, Visual)
                pieces[-2] = Visual((whole.files[0][: len(whole.files[0]) // 2],))
            yield Sample(f"{name}-{number}", tuple(pieces))

    def captions(self, name: str, count: int, rng: random.Random) -> Iterator[Sample]:
        """One image and its caption; the images have few sizes, so that samples can exchange them."""
        middle = sum(self.sides) // 2
        for number in range(count):
            file, caption = self._image((middle, self.sides[number % 2]), rng)
            yield Sample(f"{name}-{number}", (Visual((file,)), Text(caption)))

    def _image(self, size: tuple[int, int], rng: random.Random) -> tuple[bytes, str]:
        """A JPEG file of (width, height) pixels, and its caption."""
        photograph = rng.choice(self.found)
        view, share = rng.choice(list(_VIEWS.items()))
        whole = photograph.image.size
        largest = min(whole[0] / size[0], whole[1] / size[1])
        width, height = (max(1, int(share * largest * side)) for side in size)
        left, top = rng.randint(0, whole[0] - width), rng.randint(0, whole[1] - height)
        box = (left, top, left + width, top + height)
        image = photograph.image.resize(size, Image.Resampling.BICUBIC, box=box)
        column = _third((left + width / 2) / whole[0], "left", "centre", "right")
        row = _third((top + height / 2) / whole[1], "top", "middle", "bottom")
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        caption = f"Photograph of {photograph.subject}, {view}, {row} {column}. {_look(image)}."
        return file.getvalue(), caption


def _third(place: float, *names: str) -> str:
    return names[min(int(place * 3), 2)]


def _look(image: Image.Image) -> str:
    """The brightness and the mean colour in words."""
    red, green, blue = (value / 255 for value in ImageStat.Stat(image).mean)
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    colour = "grey" if saturation < 0.15 else _COLOURS[round(hue * len(_COLOURS)) % len(_COLOURS)]
    return f"{_third(value, 'Dark', 'Medium', 'Bright')} {colour}"
