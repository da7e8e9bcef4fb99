"""Patches and grids: the order of transformers' processors, the arithmetic, and what is refused."""

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids

from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import (
    VisualInput,
    check_fits,
    number_of_tokens,
    patchify,
    placeholder_mask,
    without_visual_targets,
)
from megatron_msa.model.vision.rotary import patch_positions
from megatron_msa.model.vision.segments import Segment


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 2, 8), (2, 6, 2)])
def test_the_order_is_that_of_transformers_vision_models(grid: tuple[int, int, int]) -> None:
    expected = get_vision_position_ids(torch.tensor([grid]), 2, include_temporal=True)
    positions = patch_positions(Segment(0, *grid, 0), merge=2)
    assert torch.equal(torch.stack([positions[axis] for axis in "thw"], dim=1), expected)


def test_a_patch_of_a_video_holds_its_pixels() -> None:
    """Against plain indexing: five frames, so that the last one is repeated."""
    video = torch.rand(5, 2, 8, 12)
    patches, (t, h, w) = patchify(video, patch=2, temporal_patch=2, merge=2)
    assert (t, h, w) == (3, 4, 6)
    positions = patch_positions(Segment(0, t, h, w, 0), merge=2)
    for row, (time, y, x) in enumerate(zip(*(positions[axis].tolist() for axis in "thw"), strict=True)):
        frames = [video[min(2 * time + frame, 4)] for frame in range(2)]
        pixels = [frame[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] for frame in frames]
        assert torch.equal(patches[row], torch.stack(pixels, dim=1).flatten())
    # The four patches of one token are neighbours, and the tokens are in reading order.
    blocks = torch.stack([positions["h"], positions["w"]], dim=1).view(-1, 4, 2)
    assert (blocks.amax(1) - blocks.amin(1) == 1).all()
    assert (blocks[:6, 0] // 2).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_tokens_of_grids() -> None:
    assert number_of_tokens([(1, 4, 6), (3, 2, 2)], merge=2) == [6, 3]
    assert number_of_tokens(torch.tensor([[2, 9, 3]]), merge=3) == [6]
    assert check_fits((2, 8, 8), 2, context=32) == 32


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 x 3 x 4 patches .* blocks of 2 x 2"):
        number_of_tokens([(1, 3, 4)], merge=2)
    with pytest.raises(ConfigError, match="must be positive"):
        number_of_tokens([(0, 4, 4)], merge=2)
    with pytest.raises(ConfigError, match=r"33 x 28 pixels .* multiples of 28"):
        patchify(torch.rand(1, 3, 33, 28), patch=14, temporal_patch=2, merge=2)
    with pytest.raises(ConfigError, match=r"is 64 tokens, but a sequence has 63 .*at most 252 patches"):
        check_fits((1, 16, 16), 2, context=63)
    with pytest.raises(ConfigError, match=r"\[visuals, 3\]"):
        VisualInput(torch.zeros(4, 6), torch.tensor([1, 2, 2]))


def test_no_loss_where_a_placeholder_is_to_be_predicted() -> None:
    tokens = torch.tensor([[5, 90, 90, 6, 91, 7]])
    labels = torch.tensor([[90, 90, 6, 91, 7, 8]])
    assert placeholder_mask(tokens, (90, 91)).tolist() == [[False, True, True, False, True, False]]
    mask = without_visual_targets(torch.tensor([[1.0, 1, 1, 1, 1, 0]]), labels, (90, 91))
    assert mask.tolist() == [[0, 0, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_num_attention_heads": 3}, "does not divide --vision-hidden-size 1280"),
        ({"vision_merge_size": 0}, "--vision-merge-size is 0"),
        ({"vision_segment_frames": -1}, "--vision-segment-frames is -1"),
        ({"vision_mode": "on"}, "allowed: none, train, freeze"),
        ({"vision_hidden_size": 64}, "each of the axes thw needs at least 2"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**changes)
