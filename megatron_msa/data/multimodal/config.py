"""The settings of multimodal data: one dataclass; the `--multimodal-*` flags come from it."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_msa.errors import ConfigError

ON_ERROR = ("raise", "skip")
_FINEST_SHARE = 10**6
"""Largest denominator of the share of multimodal sequences."""

# Of the CLIP models, which MiniMax-M3 and Qwen2-VL use too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True)
class MultimodalDataConfig:
    """Where multimodal samples come from and how they become sequences."""

    multimodal_data_path: str | None = None
    """Folder of an Energon dataset (WebDataset shards and .nv-meta), or a metadataset (.yaml) that blends
    several by weight. Sequences from --data-path are mixed in if that is given too."""

    multimodal_weight: float = 1.0
    """Share of the sequences that come from --multimodal-data-path; the others come from --data-path. Below
    1 with --data-path, 1 without it."""

    multimodal_on_error: str = field(default="raise", metadata={"argparse_meta": {"choices": list(ON_ERROR)}})
    """What happens to a sample that cannot be used (corrupt image, missing file, longer than a sequence):
    raise stops the run with its key; skip leaves it out, prints its key and counts it in the metrics."""

    multimodal_min_pixels: int = 3136
    """Smaller images are enlarged to about this many pixels (height x width)."""

    multimodal_max_pixels: int = 451584
    """Larger images, and frames of videos, are reduced to at most this many pixels."""

    multimodal_image_mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    """Subtracted from each colour channel (0 to 1)."""

    multimodal_image_std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    """Each colour channel is divided by this."""

    multimodal_packing_buffer: int = 256
    """Samples among which sequences are packed. More fill the sequences better and cost memory (compressed
    images) and time when a run resumes."""

    multimodal_shuffle_buffer: int = 256
    """Samples among which the order is shuffled, besides the order of the shards and their slices."""

    multimodal_blind: bool = False
    """With --vision-mode none: train on the placeholder tokens without the pixels. The control that shows
    what the images are worth."""

    multimodal_restart: bool = False
    """Read the multimodal data from its beginning although the checkpoint is of a later iteration: after a
    change of the data, of the data-parallel size or of --num-workers."""

    def __post_init__(self) -> None:
        for name in (
            "multimodal_min_pixels",
            "multimodal_max_pixels",
            "multimodal_packing_buffer",
            "multimodal_shuffle_buffer",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.multimodal_on_error not in ON_ERROR:
            raise ConfigError(
                f"--multimodal-on-error is {self.multimodal_on_error!r}; allowed: {', '.join(ON_ERROR)}"
            )
        if not 0 < self.multimodal_weight <= 1:
            raise ConfigError(
                f"--multimodal-weight is {self.multimodal_weight}; it is a share of the sequences, above 0 "
                "and at most 1"
            )
        if not self.share:
            raise ConfigError(
                f"--multimodal-weight is {self.multimodal_weight}, which is rounded to no sequence at all: "
                f"give at least {1 / _FINEST_SHARE:g}, or leave out --multimodal-data-path"
            )
        if self.multimodal_min_pixels > self.multimodal_max_pixels:
            raise ConfigError(
                f"--multimodal-min-pixels {self.multimodal_min_pixels} is above --multimodal-max-pixels "
                f"{self.multimodal_max_pixels}"
            )
        if any(value <= 0 for value in self.multimodal_image_std):
            raise ConfigError(f"--multimodal-image-std is {self.multimodal_image_std}; all must be above 0")

    @property
    def share(self) -> Fraction:
        """The weight as a ratio of whole numbers, so that no rounding decides between the sources."""
        return Fraction(self.multimodal_weight).limit_denominator(_FINEST_SHARE)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "MultimodalDataConfig | None":
        """The settings among parsed arguments; None without --multimodal-data-path.

        Raises:
            ConfigError: settings that cannot be used.
        """
        if getattr(args, "multimodal_data_path", None) is None:
            return None
        names = multimodal_field_names()
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def multimodal_field_names() -> list[str]:
    """Names of the settings, which are those of the arguments too."""
    return [each.name for each in dataclasses.fields(MultimodalDataConfig)]


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"
