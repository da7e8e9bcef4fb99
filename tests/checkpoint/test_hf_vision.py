"""MiniMax-M3's vision part: features and logits of transformers, both directions, with and without vision."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hf_models import VOCABULARY, save_model

from megatron_msa.checkpoint.hf import to_hf, to_megatron, verify  # isort: skip
from megatron_msa.checkpoint.hf.families import minimax_m3_vision
from megatron_msa.checkpoint.hf.megatron_model import single_process
from megatron_msa.checkpoint.hf.safetensors_files import SafetensorsReader
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.inputs import VisualInput, number_of_tokens
from megatron_msa.model.vision.segments import cut_into_segments

FP32_NOISE = 2e-5
"""Features are about 1 and logits about 3; only the order of additions differs."""
GRIDS = ([1, 4, 6], [3, 2, 4])
"""An image, and a video: odd in time, not square."""


class Model(NamedTuple):
    source: Path
    checkpoint: Path
    hf: Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("m3")
    hf = save_model("minimax_m3", folder / "hf").float().eval()
    to_megatron.convert(folder / "hf", folder / "megatron")
    return Model(folder / "hf", folder / "megatron", hf)


def visual(grid: list[int]) -> VisualInput:
    generator = torch.Generator().manual_seed(sum(grid))
    return VisualInput(
        torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 14 * 14, generator=generator), torch.tensor([grid])
    )


def tokens_around(grid: list[int], placeholder: int) -> Tensor:
    (count,) = number_of_tokens([grid], 2)
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(VOCABULARY - 2, (1, 40), generator=generator)
    words[0, 7 : 7 + count] = placeholder
    return words


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_the_features_are_those_of_transformers(model: Model, grid: list[int]) -> None:
    image = visual(grid)
    expected = model.hf.get_image_features(image.patches, image.grid_thw).pooler_output
    with single_process():
        ours = verify.load_megatron_model(model.checkpoint / "release")
        segments = cut_into_segments(image.grid_thw.tolist(), ours.vision)
        actual = ours.vision_model(image.patches, segments)
    assert expected.std() > 0.1, "the comparison would say nothing"
    assert (actual - expected).abs().max() < FP32_NOISE


@pytest.mark.parametrize(("grid", "placeholder"), zip(GRIDS, (VOCABULARY - 2, VOCABULARY - 1), strict=True))
@torch.no_grad()
def test_the_logits_of_text_with_an_image_or_a_video_are_those_of_transformers(
    model: Model, grid: list[int], placeholder: int
) -> None:
    image, tokens = visual(grid), tokens_around(grid, placeholder)
    kind = {"pixel_values": image.patches, "image_grid_thw": image.grid_thw}
    if placeholder == VOCABULARY - 1:
        kind = {"pixel_values_videos": image.patches, "video_grid_thw": image.grid_thw}
    expected = model.hf(input_ids=tokens, use_cache=False, **kind).logits
    actual = verify.megatron_logits(model.checkpoint / "release", tokens, image)[..., :VOCABULARY]
    assert (actual - expected).abs().max() < FP32_NOISE


@pytest.mark.slow
def test_verification_puts_an_image_among_the_tokens(model: Model) -> None:
    text = verify.verify(model.source, model.checkpoint / "release", num_tokens=48)
    assert "patches of an image" in text
    assert float(text.split("logit ")[1].split(" ")[0]) < FP32_NOISE


def test_the_axes_follow_from_the_configuration(model: Model, tmp_path: Path) -> None:
    """As released: three axes, segments of four. As transformers writes it: what transformers turns."""
    config = json.loads((model.source / "config.json").read_text())
    as_written = minimax_m3_vision.to_megatron(verify.sidecar.load_config(model.source))
    assert as_written["vision_rope_axes"] == verify.turned_axes(verify.sidecar.load_config(model.source))
    assert as_written["vision_segment_frames"] == 0
    config["vision_config"] |= {"rope_mode": "3d", "vision_segment_max_frames": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    released = minimax_m3_vision.to_megatron(verify.sidecar.load_config(tmp_path))
    assert (released["vision_rope_axes"], released["vision_segment_frames"]) == ("thw", 4)


def test_a_text_model_is_made_on_request_and_gets_its_vision_part_back(model: Model, tmp_path: Path) -> None:
    report = to_megatron.convert(model.source, tmp_path / "text", text_only=True)
    assert len(report.ignored) == 27
    assert "vision" not in (tmp_path / "text/megatron_flags.sh").read_text()
    with pytest.raises(ConfigError, match="the vision part is needed"):
        to_hf.convert(tmp_path / "text", tmp_path / "lost")
    back = to_hf.convert(tmp_path / "text", tmp_path / "back", hf_source=model.source)
    assert len(back.copied) == 27
    assert (tmp_path / "back/config.json").read_text() == (model.source / "config.json").read_text()
    to_hf.convert(tmp_path / "text", tmp_path / "alone", architecture="MiniMaxM3VLForCausalLM")


def test_a_language_model_alone_has_no_place_for_the_vision_part(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has a vision part"):
        to_hf.convert(model.checkpoint, tmp_path / "back", architecture="MiniMaxM3VLForCausalLM")


def test_a_model_trained_here_is_exported_without_a_source(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model.checkpoint, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/hf")
    to_hf.convert(tmp_path / "bare", tmp_path / "back", vocab_size=VOCABULARY)
    ours, theirs = (SafetensorsReader(folder) for folder in (tmp_path / "back", model.source))
    assert sum(info.nbytes for info in ours.tensors.values()) == sum(
        info.nbytes for info in theirs.tensors.values()
    )
    grid = GRIDS[0]
    image, tokens = visual(grid), tokens_around(grid, VOCABULARY - 2)
    expected = verify.hf_logits(model.source, tokens, image)
    assert torch.equal(verify.hf_logits(tmp_path / "back", tokens, image), expected)


def test_an_encoder_that_the_family_lacks_is_refused(model: Model) -> None:
    settings = to_megatron.by_config(
        json.loads((model.source / "config.json").read_text()), "here"
    ).to_settings(verify.sidecar.load_config(model.source), 128)
    with pytest.raises(ConfigError, match="vision_rope_axes is 'hw'"):
        minimax_m3_vision.to_hf(settings | {"vision_rope_axes": "hw"})
    config = verify.sidecar.load_config(model.source)
    config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(ConfigError, match="quick_gelu"):
        minimax_m3_vision.to_megatron(config)
