"""The settings of the vision encoder and its projector: one dataclass; the `--vision-*` flags come from it.

The defaults are MiniMax-M3's: 32 layers of 1280 channels, patches of 14 x 14 pixels and 2 frames, 2 x 2
patches merged to one token.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field

from megatron_msa.errors import ConfigError

MODES = ("none", "train", "freeze")
ROPE_AXES = ("thw", "hw", "th")
_POSITIVE = (
    "vision_num_layers",
    "vision_hidden_size",
    "vision_ffn_hidden_size",
    "vision_num_attention_heads",
    "vision_num_channels",
    "vision_patch_size",
    "vision_temporal_patch_size",
    "vision_merge_size",
)


def _choice(default: str, choices: tuple[str, ...]) -> str:
    return field(default=default, metadata={"argparse_meta": {"choices": list(choices)}})


@dataclass(kw_only=True)
class VisionConfig:
    """Vision encoder, projector and patch merge of a multimodal model."""

    vision_mode: str = _choice("none", MODES)
    """none: a text model. train: encoder and projector train with the backbone from the first step. freeze:
    the encoder keeps its weights (see --vision-load), the projector trains."""

    vision_load: str | None = None
    """Start the encoder and the projector from the vision part of this Megatron checkpoint (any run's
    --save folder, or MiniMax-M3 converted by hf-to-megatron). Read at the first start of a run only."""

    vision_image_token_id: int | None = None
    """Token that stands where an image is; one for each merged patch. Required with --vision-mode."""

    vision_video_token_id: int | None = None
    """Token that stands where a video is, if it is another one (in MiniMax-M3 it is)."""

    vision_num_layers: int = 32
    """Transformer layers of the encoder."""

    vision_hidden_size: int = 1280
    """Channels of the encoder."""

    vision_ffn_hidden_size: int = 5120
    """Width of the encoder's feed-forward networks."""

    vision_num_attention_heads: int = 16
    """Attention heads of the encoder; they divide --vision-hidden-size."""

    vision_num_channels: int = 3
    """Colour channels of a pixel."""

    vision_patch_size: int = 14
    """Pixels of a patch along height and width."""

    vision_temporal_patch_size: int = 2
    """Frames of a patch. A still image is repeated to fill it."""

    vision_merge_size: int = 2
    """Patches along height and width that become one token of the language model."""

    vision_projector_hidden_size: int | None = None
    """Width of the projector's and the merge's hidden layers. Default: --hidden-size."""

    vision_layernorm_epsilon: float = 1e-5
    """Added to the variance in the encoder's layer norms."""

    vision_rope_axes: str = _choice("thw", ROPE_AXES)
    """Axes of the encoder's rotary embedding, each with an equal share of a head's channels: time, height and
    width (the released MiniMax-M3), height and width, or time and height (what transformers 5.17 computes for
    MiniMax-M3)."""

    vision_rope_base: float = 10000.0
    """Base of the encoder's rotary frequencies."""

    vision_segment_frames: int = 4
    """Patches along time of a video that attend to each other; a longer video is cut into such segments, each
    with times from 0 (MiniMax-M3: 4). 0: the whole video."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.vision_segment_frames < 0:
            raise ConfigError(
                f"--vision-segment-frames is {self.vision_segment_frames}; it must be positive, or 0 "
                "for whole videos"
            )
        for name, choices in (("vision_mode", MODES), ("vision_rope_axes", ROPE_AXES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)!r}; allowed: {', '.join(choices)}")
        if self.vision_hidden_size % self.vision_num_attention_heads:
            raise ConfigError(
                f"--vision-num-attention-heads {self.vision_num_attention_heads} does not divide "
                f"--vision-hidden-size {self.vision_hidden_size}"
            )
        if self.rotary_dims_per_axis < 2:
            raise ConfigError(
                f"a head of the vision encoder has {self.head_dim} channels (--vision-hidden-size over "
                f"--vision-num-attention-heads), but each of the axes {self.vision_rope_axes} needs at "
                "least 2"
            )

    @property
    def head_dim(self) -> int:
        """Channels of an attention head of the encoder."""
        return self.vision_hidden_size // self.vision_num_attention_heads

    @property
    def rotary_dims_per_axis(self) -> int:
        """Channels of a head that one axis turns, an even number; what is left over is not turned."""
        return self.head_dim // len(self.vision_rope_axes) // 2 * 2

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: channels x frames x height x width."""
        return self.vision_num_channels * self.vision_temporal_patch_size * self.vision_patch_size**2

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that visual embeddings replace."""
        ids = (self.vision_image_token_id, self.vision_video_token_id)
        return tuple(dict.fromkeys(each for each in ids if each is not None))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "VisionConfig | None":
        """The settings among parsed or saved arguments; None for a text model.

        Raises:
            ConfigError: settings that no encoder can be made of.
        """
        if getattr(args, "vision_mode", "none") == "none":
            return None
        return cls(**{name: getattr(args, name) for name in vision_field_names() if hasattr(args, name)})


def vision_field_names() -> list[str]:
    """Names of the settings, which are those of the arguments too."""
    return [each.name for each in dataclasses.fields(VisionConfig)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
