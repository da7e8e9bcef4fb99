"""The vision part in checkpoints: GQA -> MSA keeps it, --vision-load takes it from elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor

from megatron_msa.checkpoint import gqa_to_msa
from megatron_msa.checkpoint.hf.megatron_model import build
from megatron_msa.errors import ConfigError
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint
from megatron_msa.model.multimodal import MultimodalGPT
from megatron_msa.training.vision_start import VisionStart, read_vision, vision_checkpoint
from tests.attention.tiny import VOCABULARY, initial_model, set_phase, tiny_arguments
from tests.vision.tiny import interleaved, random_visuals, run, tiny_vision

from megatron_msa.phases import Phase  # isort: skip

ARGUMENTS = tiny_arguments(
    padded_vocab_size=VOCABULARY,
    max_position_embeddings=64,
    msa_layer_freq="([0]*2)",
    msa_schedule="dense@0",
    **vars(tiny_vision()),
)


def model_of(checkpoint: Path, **settings: Any) -> MultimodalGPT:
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    model = build(model_config_from_checkpoint(common["args"], msa_backend="reference", **settings))
    state = {"model": model.sharded_state_dict(metadata=common.get("content_metadata"))}
    model.load_state_dict(dist_checkpointing.load(state, str(checkpoint))["model"])
    return model.eval()


@pytest.fixture(params=[{}, {"non_homogeneous_layers": True, "singleton_local_shards": True}])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint folder of a dense multimodal model, in both notations of Megatron."""
    model = build(model_config_from_checkpoint(ARGUMENTS, msa_schedule="warmup@0"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path / "dense/iter_0000003"
    folder.mkdir(parents=True)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group()}
    state = model.sharded_state_dict(metadata=request.param | groups)
    dist_checkpointing.save(
        {"model": state, "args": ARGUMENTS, "iteration": 3}, str(folder), content_metadata=request.param
    )
    (tmp_path / "dense/latest_checkpointed_iteration.txt").write_text("3")
    return folder


def logits_with_an_image(model: MultimodalGPT) -> Tensor:
    grids = [(1, 4, 4), (3, 2, 2)]
    torch.manual_seed(3)
    tokens = interleaved(grids, [4, 5, 6])
    with torch.no_grad():
        return run(model, tokens, random_visuals(grids, dtype=torch.float32))


def test_gqa_to_msa_keeps_encoder_and_projector(dense: Path, tmp_path: Path) -> None:
    report = gqa_to_msa.convert(dense.parent, tmp_path / "msa")
    assert any(name.startswith("vision_model.") for name in report.mapped)
    assert not any(name.startswith("vision_model.") for name in report.initialised)
    expected = logits_with_an_image(model_of(dense, msa_schedule="warmup@0"))
    converted = model_of(tmp_path / "msa/iter_0000003", msa_schedule="warmup@0")
    set_phase(converted, Phase.DENSE)
    assert torch.equal(logits_with_an_image(converted), expected)


def test_the_vision_part_of_another_checkpoint_is_read(dense: Path) -> None:
    torch.manual_seed(9)
    model = initial_model(vision=tiny_vision())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    read_vision(model, vision_checkpoint(str(dense.parent)))
    source = dict(model_of(dense).named_parameters())
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("vision_model.")
        assert torch.equal(parameter, source[name] if is_vision else before[name]), name
        if is_vision:
            assert not torch.equal(parameter, before[name]), name


def test_an_encoder_of_other_sizes_is_refused(dense: Path) -> None:
    model = initial_model(vision=tiny_vision(vision_ffn_hidden_size=40))
    with pytest.raises(ConfigError, match=r"linear_fc1.* has the shape .*36.* but .*40"):
        read_vision(model, dense)


class TestStart:
    """Which of two checkpoints the vision part comes from."""

    def request(self) -> dict[str, Any]:
        return {"model": initial_model(vision=tiny_vision()).sharded_state_dict(), "args": None}

    def test_a_checkpoint_with_a_vision_part_is_loaded_as_it_is(self, dense: Path) -> None:
        request = self.request()
        entries = dict(request["model"])
        start = VisionStart("nowhere")
        start.before_load(dense, request)
        assert request["model"] == entries
        start.finish([], None)  # does not look for the other one

    def test_of_a_text_model_the_vision_part_is_not_asked_for(self, text: Path) -> None:
        request = self.request()
        VisionStart("somewhere").before_load(text, request)
        kinds = {
            name: type(entry).__name__
            for name, entry in request["model"].items()
            if "_extra_state" not in name
        }
        local = {name for name, kind in kinds.items() if kind == "LocalNonpersistentObject"}
        assert local == {name for name in kinds if name.startswith("vision_model.")}
        dist_checkpointing.load(request, str(text))

    def test_a_text_model_needs_to_be_told_where_the_encoder_is(self, text: Path) -> None:
        with pytest.raises(ConfigError, match="--vision-load"):
            VisionStart(None).before_load(text, self.request())
        with pytest.raises(ConfigError, match="--no-load-optim"):
            VisionStart("somewhere").before_load(text, self.request() | {"optimizer": {}})
        with pytest.raises(ConfigError, match="is of a text model"):
            vision_checkpoint(str(text.parent))

    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        folder = tmp_path / "text/iter_0000001"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": initial_model().sharded_state_dict()}, str(folder))
        (tmp_path / "text/latest_checkpointed_iteration.txt").write_text("1")
        return folder
