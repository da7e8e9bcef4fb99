"""The encoder's part of what is logged and shown: FLOPs of a step, parameters."""

import pytest
import torch

from megatron_msa.model.vision import flops
from megatron_msa.training.parameter_count import count_parameters
from megatron_msa.training.speed import EncodedPatches, speed
from tests.attention.tiny import VOCABULARY, initial_model, tiny_config
from tests.vision.tiny import random_visuals, tiny_vision


def test_the_patches_of_a_step_are_counted_once_per_replica() -> None:
    """Two steps of two microbatches, seen by two ranks of a replica: here one, so that copies are as good."""
    vision = tiny_vision()
    counted = EncodedPatches(vision, 32)
    for grids in ([(1, 4, 4)], [(5, 2, 2), (1, 2, 2)]):
        counted.add(random_visuals(grids))
    patches, pairs = 16 + 20 + 4, 16**2 + 8**2 + 8**2 + 4**2 + 4**2  # the video is three segments
    expected = flops.step_flops(vision, 32, patches=patches / 4, pairs=pairs / 4)
    assert counted.flops_per_step(2, 2, "cpu") == pytest.approx(expected)
    assert counted.flops_per_step(1, 1, "cpu") == 0


def test_both_figures_of_a_step_contain_the_encoder() -> None:
    inputs = {"padded_vocab_size": VOCABULARY, "tokens": 30, "causal_pairs": 465, "sparse_pairs": 300}
    inputs |= {"phase": "sparse", "seconds": 2.0, "num_devices": 4, "peak_tflops": 1.0}
    without = speed(tiny_config(), **inputs)
    with_vision = speed(tiny_config(), **inputs, vision_flops=8e12)
    for name in ("tflops_executed", "tflops_dense_equivalent", "mfu"):
        assert with_vision[name] - without[name] == pytest.approx(1.0)
    assert with_vision["tokens_per_second"] == without["tokens_per_second"]


def test_parameters_are_those_of_the_model_and_none_is_active_for_text() -> None:
    vision = tiny_vision()
    text, both = (
        count_parameters(tiny_config(), padded_vocab_size=VOCABULARY, untied_embeddings=True, vision=each)
        for each in (None, vision)
    )
    torch.manual_seed(1)
    assert both.total == sum(each.numel() for each in initial_model(vision=vision).parameters())
    assert both.active == text.active
    assert both.by_part["vision_encoder"] + both.by_part["vision_projector"] == both.total - text.total
