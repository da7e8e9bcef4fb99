"""The marks around the encoder's part of a step."""

import pytest
import torch

from megatron_msa.model.multimodal import MultimodalGPT
from megatron_msa.training import encoder_time
from megatron_msa.training.encoder_time import EncoderTime
from tests.attention.tiny import tiny_config, tiny_model
from tests.vision.tiny import interleaved, random_visuals, run, tiny_vision

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="reads the host's clock")
GRIDS = [[1, 4, 4], [1, 2, 4]]


class Watch:
    """A clock on which a second passes with every reading, and what has a gradient at each of them."""

    def __init__(self, model: MultimodalGPT) -> None:
        assert model.vision_model is not None
        self.parameters = [each for each in model.vision_model.parameters() if each.requires_grad]
        self.gradients: list[int] = []

    def perf_counter(self) -> float:
        self.gradients.append(sum(each.grad is not None for each in self.parameters))
        return float(len(self.gradients))


@pytest.fixture(params=["train", "freeze"])
def model(request: pytest.FixtureRequest) -> MultimodalGPT:
    model = tiny_model(tiny_config(), vision=tiny_vision(vision_mode=request.param))
    assert isinstance(model, MultimodalGPT)
    return model


@pytest.mark.parametrize("has_images", [True, False])
def test_marks_enclose_the_forward_and_the_backward_pass(
    model: MultimodalGPT, has_images: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, clock = Watch(model), EncoderTime([model])
    monkeypatch.setattr(encoder_time, "time", watch)
    tokens = interleaved(GRIDS, [3, 5, 7])
    visuals = random_visuals(GRIDS) if has_images else None
    for _ in range(2):
        run(model, tokens, visuals).logsumexp(-1).sum().backward()
        # Begin and end forward, begin backward; at its end every parameter that trains has its gradient.
        assert watch.gradients[-4:] == [0, 0, 0, len(watch.parameters)]
        model.zero_grad()
    saved = clock.saved()
    run(model, tokens, visuals).logsumexp(-1).sum().backward()
    clock.restore(saved)  # the step is run again
    with torch.no_grad():
        run(model, tokens, visuals)  # an evaluation
    assert clock.seconds_per_step(2, "cpu") == 2
    assert clock.seconds_per_step(1, "cpu") == 0
