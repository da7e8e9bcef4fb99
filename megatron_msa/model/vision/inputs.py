"""Images and videos as the model takes them, and the arithmetic between pixels, patches and tokens.

A *visual* is one image or one video. It is a grid of patches, t x h x w; with temporal patches of two frames
an image has t = 1 (it is repeated). Patches of one time are merged, 2 x 2 to one token of the language model.

Order of the patches of a visual, as the Qwen2-VL and MiniMax-M3 processors of transformers write them: by
time; within a time by merge block, row by row; within a block row by row. So the m x m patches that become
one token lie next to each other, and the tokens are in reading order. Values of one patch: channel, frame,
row, column, the last one fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_msa.errors import ConfigError


@dataclass(frozen=True)
class VisualInput:
    """The images and videos of a microbatch, in the order of their placeholders in the token stream.

    The token stream of a microbatch is sample after sample, each from its first token to its last. Every rank
    gets the visuals of the whole microbatch, also under tensor and context parallelism: the model decides
    which rank encodes what.

    Attributes:
        patches: float [patches of all visuals, channels * temporal patch * patch * patch], normalised pixels.
        grid_thw: int64 [visuals, 3], patches along time, height and width. On the CPU: its values are read on
            the host, and on a GPU every microbatch would wait for it.
    """

    patches: Tensor
    grid_thw: Tensor

    def __post_init__(self) -> None:
        if self.grid_thw.dim() != 2 or self.grid_thw.shape[1] != 3:
            raise ConfigError(
                f"grid_thw has shape {tuple(self.grid_thw.shape)}; it must be [visuals, 3] (time, height, "
                "width)"
            )
        if self.patches.dim() != 2:
            raise ConfigError(
                f"patches have shape {tuple(self.patches.shape)}; they must be [patches, values of a patch]"
            )

    def check(self, values: int) -> None:
        """Compare patches with grids.

        Args:
            values: numbers in a patch, as the encoder takes them.

        Raises:
            ConfigError: the numbers differ.
        """
        expected = int(self.grid_thw.prod(dim=1).sum())
        if self.patches.shape[0] != expected:
            raise ConfigError(
                f"a microbatch has {self.patches.shape[0]} patches of pixels, but its grids have {expected}; "
                "patches and grid_thw must describe the same visuals"
            )
        if self.patches.shape[1] != values:
            raise ConfigError(
                f"the patches of a microbatch are of {self.patches.shape[1]} values each, but those of the "
                f"encoder have {values} (--vision-num-channels x --vision-temporal-patch-size x "
                "--vision-patch-size squared)"
            )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> VisualInput:
        """The patches on ``device``; the grids stay where they are."""
        return VisualInput(self.patches.to(device, dtype, non_blocking=True), self.grid_thw)


def tokens_of_grid(grid: Sequence[int], merge: int) -> int:
    """Placeholder tokens of one visual: t * h * w / merge^2.

    Args:
        grid: patches along time, height and width.
        merge: patches along height and width that become one token.

    Raises:
        ConfigError: the grid is empty or does not divide into merge blocks.
    """
    time, height, width = (int(each) for each in grid)
    if min(time, height, width) < 1:
        raise ConfigError(
            f"a visual has a grid of {time} x {height} x {width} patches; each must be positive"
        )
    if height % merge or width % merge:
        raise ConfigError(
            f"a visual has a grid of {time} x {height} x {width} patches (time, height, width), which does "
            f"not divide into blocks of {merge} x {merge}: resize it so that height and width in pixels are "
            f"multiples of the patch size times {merge}"
        )
    return time * (height // merge) * (width // merge)


def number_of_tokens(grid_thw: Tensor | Iterable[Sequence[int]], merge: int) -> list[int]:
    """Placeholder tokens of each visual; see `tokens_of_grid`."""
    grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    return [tokens_of_grid(grid, merge) for grid in grids]


def check_fits(grid: Sequence[int], merge: int, context: int) -> int:
    """The tokens of a visual that must lie within one sequence.

    Args:
        grid: patches along time, height and width.
        merge: patches along height and width that become one token.
        context: tokens of a sequence.

    Raises:
        ConfigError: it has more tokens than a sequence; names both numbers and the largest size.
    """
    tokens = tokens_of_grid(grid, merge)
    if tokens > context:
        time, height, width = (int(each) for each in grid)
        raise ConfigError(
            f"a visual of {time} x {height} x {width} patches is {tokens} tokens, but a sequence has "
            f"{context} (--seq-length): make it smaller (at most {context * merge * merge} patches) or the "
            "sequence longer"
        )
    return tokens


def patchify(
    frames: Tensor, *, patch: int, temporal_patch: int, merge: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut normalised pixels into patches, in the order of this module.

    Args:
        frames: [frames, channels, height, width]; an image is one frame. The last frame is repeated until the
            frames fill the temporal patches.
        patch: pixels of a patch along height and width.
        temporal_patch: frames of a patch.
        merge: patches along height and width that become one token.

    Returns:
        [t * h * w, channels * temporal_patch * patch * patch] and the grid (t, h, w).

    Raises:
        ConfigError: height or width is not a multiple of patch * merge.
    """
    count, channels, height, width = frames.shape
    unit = patch * merge
    if height % unit or width % unit or not frames.numel():
        raise ConfigError(
            f"an image of {height} x {width} pixels (height x width) cannot be cut into patches of {patch} "
            f"merged {merge} x {merge}: both must be multiples of {unit}"
        )
    missing = -count % temporal_patch
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    t, h, w = frames.shape[0] // temporal_patch, height // patch, width // patch
    cut = frames.reshape(t, temporal_patch, channels, h // merge, merge, patch, w // merge, merge, patch)
    # -> time, block row, block column, row and column in the block; channel, frame, pixel row, pixel column
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(t * h * w, channels * temporal_patch * patch * patch), (t, h, w)


def placeholder_mask(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Where placeholders stand: bool, the shape of ``tokens``."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for each in ids:
        mask |= tokens == each
    return mask


def without_visual_targets(loss_mask: Tensor, labels: Tensor, ids: Sequence[int]) -> Tensor:
    """The loss mask with 0 where the token to be predicted is a placeholder.

    The last placeholder of a visual keeps its loss: it predicts the text that follows.

    Args:
        loss_mask: float, 1 where a token counts.
        labels: tokens to be predicted, the shape of ``loss_mask``.
        ids: of the placeholder tokens.
    """
    return loss_mask.masked_fill(placeholder_mask(labels, ids), 0.0)
