"""The encoder against a brute-force one in plain tensors, and what must not change its result."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_msa.model.vision import flops
from megatron_msa.model.vision.attention import by_runs
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.encoder import VisionModel
from megatron_msa.model.vision.inputs import number_of_tokens
from megatron_msa.model.vision.rotary import rotary_angles
from megatron_msa.model.vision.segments import cut_into_segments, deal
from tests.attention.tiny import DEVICE, tiny_config
from tests.vision.tiny import MERGE, random_visuals, tiny_vision

GRIDS = [(1, 4, 6), (5, 2, 4), (1, 2, 2), (1, 2, 2)]
"""Images of three sizes and a video of three segments (2, 2 and 1 along time)."""


def encoder(vision: VisionConfig, **language: Any) -> VisionModel:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = VisionModel(vision, tiny_config(**language), groups)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(DEVICE, torch.float64)


def brute_force(model: VisionModel, patches: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    """One sequence of all patches, a mask of the square of them, and rotations as complex numbers."""
    vision, weights = model.vision, dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    places = []  # (segment, time in it, row, column) of every patch
    number = 0
    for t, h, w in grids:
        step = vision.vision_segment_frames or t
        for time in range(t):
            for block in range(h * w // MERGE**2):
                row, column = divmod(block, w // MERGE)
                for inner in range(MERGE**2):
                    y, x = divmod(inner, MERGE)
                    places.append((number + time // step, time % step, row * MERGE + y, column * MERGE + x))
        number += -(-t // step)
    segment, *axes = torch.tensor(places, device=DEVICE).t()
    mask = segment[:, None] == segment[None, :]
    positions = dict(zip("thw", axes, strict=True))
    dims = 2 * (vision.head_dim // (2 * len(vision.vision_rope_axes)))
    frequencies = vision.vision_rope_base ** -(torch.arange(0, dims, 2, device=DEVICE).float() / dims)
    angles = torch.cat([positions[axis][:, None] * frequencies for axis in vision.vision_rope_axes], dim=1)
    turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]

    def rotate(x: Tensor) -> Tensor:
        half = turn.shape[-1]
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)

    hidden = norm(patches @ weights["patch_embedding.weight"].t(), "pre_norm")
    heads = vision.vision_num_attention_heads
    for layer in range(vision.vision_num_layers):
        name = f"encoder.layers.{layer}"
        qkv = linear(norm(hidden, f"{name}.input_layernorm"), f"{name}.self_attention.linear_qkv")
        q, k, v = qkv.view(len(hidden), heads, 3, -1).unbind(2)
        scores = torch.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / vision.head_dim**0.5
        shares = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        output = torch.einsum("hij,jhd->ihd", shares, v).flatten(1)
        hidden = hidden + linear(output, f"{name}.self_attention.linear_proj")
        inner = F.gelu(linear(norm(hidden, f"{name}.pre_mlp_layernorm"), f"{name}.mlp.linear_fc1"))
        hidden = hidden + linear(inner, f"{name}.mlp.linear_fc2")
    projected = linear(F.gelu(linear(hidden, "projector.linear_fc1")), "projector.linear_fc2")
    merged = projected.reshape(len(projected) // MERGE**2, -1)
    return linear(F.gelu(linear(merged, "merge.linear_fc1")), "merge.linear_fc2")


@pytest.mark.parametrize("axes", ["thw", "hw", "th"])
@pytest.mark.parametrize("segment_frames", [2, 0])
def test_packed_segments_give_what_a_masked_encoder_gives(axes: str, segment_frames: int) -> None:
    vision = tiny_vision(vision_rope_axes=axes, vision_segment_frames=segment_frames)
    model, visuals = encoder(vision), random_visuals(GRIDS)
    actual = model(visuals.patches, cut_into_segments(GRIDS, vision))
    expected = brute_force(model, visuals.patches, GRIDS)
    assert actual.shape == (sum(number_of_tokens(GRIDS, MERGE)), 32)
    assert (actual - expected).abs().max() < 1e-10 * expected.abs().max()


def test_attention_keeps_to_its_segments() -> None:
    lengths = (3, 3, 5, 1)
    q, k, v = torch.randn(3, sum(lengths), 2, 6, dtype=torch.float64)
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = number[:, None] == number
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask)
    assert torch.allclose(by_runs(q, k, v, lengths), expected.transpose(0, 1), rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_masked_encoder_also_with_recomputation() -> None:
    visuals, segments = random_visuals(GRIDS), cut_into_segments(GRIDS, tiny_vision())
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for language in ({}, recompute):
        model = encoder(tiny_vision(), **language).train()
        weight = torch.randn(sum(number_of_tokens(GRIDS, MERGE)), 32, dtype=torch.float64, device=DEVICE)
        (brute_force(model, visuals.patches, GRIDS) * weight).sum().backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        (model(visuals.patches, segments) * weight).sum().backward()
        for name, parameter in model.named_parameters():
            scale = expected[name].abs().max()
            assert scale > 0, name
            assert (parameter.grad - expected[name]).abs().max() < 1e-9 * scale, name


def test_a_frozen_encoder_trains_its_projector_only() -> None:
    model = encoder(tiny_vision(vision_mode="freeze")).train()
    visuals = random_visuals(GRIDS)
    segments = cut_into_segments(GRIDS, model.vision)
    output = model(visuals.patches, segments)
    output.sum().backward()
    trained = {name.split(".")[0] for name, each in model.named_parameters() if each.grad is not None}
    assert trained == {"projector", "merge"}
    # Megatron's optimizer would decay a parameter that only has no gradient.
    trains = {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert trains == trained
    assert torch.equal(output, model(visuals.patches, segments).detach())


def test_the_angles_of_minimax_m3_leave_two_channels_alone() -> None:
    """A head of 80 channels: 13 angles for each of three axes, in both halves of 78 channels."""
    config = VisionConfig(vision_mode="train")
    angles = rotary_angles(cut_into_segments([(2, 4, 6)], config), config, DEVICE)
    assert angles.shape == (48, 1, 1, 78)
    last = angles[-1, 0, 0]  # time 1, row 3, column 5
    frequencies = 10000.0 ** -(torch.arange(13, device=DEVICE) / 13)
    expected = torch.cat([1 * frequencies, 3 * frequencies, 5 * frequencies])
    torch.testing.assert_close(last, torch.cat([expected, expected]))


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_segments_are_dealt_evenly(ranks: int) -> None:
    """No rank has more than the mean and the largest segment, which longest-first dealing guarantees."""
    config = VisionConfig(vision_mode="train")
    sizes = [(1, 2 * (1 + 7 * i % 19), 2 * (1 + 5 * i % 23)) for i in range(40)] + [(64, 24, 24)]
    segments = cut_into_segments(sizes, config)
    assert len(segments) == 40 + 16
    owner = deal(segments, config, 3072, ranks)
    work = [flops.forward_flops(config, 3072, [segment.patches]) for segment in segments]
    loads = [sum(w for w, rank in zip(work, owner, strict=True) if rank == each) for each in range(ranks)]
    assert max(loads) <= sum(work) / ranks + max(work)
    assert max(loads) < 1.1 * sum(work) / ranks
    assert owner == deal(segments, config, 3072, ranks)


def test_segments_lie_one_behind_the_other() -> None:
    segments = cut_into_segments(GRIDS, tiny_vision())
    assert [(each.t, each.h, each.w) for each in segments] == [
        (1, 4, 6), (2, 2, 4), (2, 2, 4), (1, 2, 4), (1, 2, 2), (1, 2, 2)
    ]  # fmt: skip
    assert [each.start for each in segments] == [0, *accumulate(each.patches for each in segments)][:-1]
    assert sum(each.tokens for each in segments) == sum(number_of_tokens(GRIDS, MERGE))


def test_operations_and_parameters_are_counted_as_they_are_executed() -> None:
    """PyTorch counts the matrix products, except in attention, which is one operator."""
    vision = tiny_vision()
    model, visuals = encoder(vision).train(), random_visuals(GRIDS)
    segments = cut_into_segments(GRIDS, vision)
    lengths = [segment.patches for segment in segments]
    pairs = sum(length**2 for length in lengths)
    product = 2 * pairs * vision.vision_hidden_size * vision.vision_num_layers

    def counted(vision: VisionConfig, *, backward: bool) -> int:
        model.vision = vision
        for name, parameter in model.named_parameters():
            encodes = not name.startswith(("projector", "merge"))
            parameter.requires_grad_(vision.vision_mode == "train" or not encodes)
        with FlopCounterMode(display=False) as counter:
            output = model(visuals.patches, segments)
            if backward:
                output.sum().backward()
        operators = counter.get_flop_counts()["Global"]
        return sum(count for operator, count in operators.items() if "attention" not in str(operator))

    inputs = {"patches": sum(lengths), "pairs": pairs}
    assert counted(vision, backward=False) == flops.forward_flops(vision, 32, lengths) - 2 * product
    assert counted(vision, backward=True) == flops.step_flops(vision, 32, **inputs) - 7 * product
    frozen = tiny_vision(vision_mode="freeze")
    # Megatron's linear layer computes the gradient of its input, whether or not anyone takes it.
    thrown_away = 2 * sum(lengths) * vision.vision_hidden_size * flops.projector_width(vision, 32)
    expected = flops.step_flops(frozen, 32, **inputs) - 2 * product + thrown_away
    assert counted(frozen, backward=True) == expected
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    projector = sum(size for name, size in sizes.items() if name.startswith(("projector", "merge")))
    assert flops.projector_parameters(vision, 32) == projector
    assert flops.encoder_parameters(vision) == sum(sizes.values()) - projector


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_gives_what_single_segments_give(dtype: torch.dtype) -> None:
    from megatron_msa.model.vision.attention import SegmentAttention
    from megatron_msa.model.vision.segments import PackedSegments

    segments = cut_into_segments([(1, 34, 46), (9, 8, 6), (1, 2, 2)], tiny_vision())
    packed = PackedSegments.build(segments, DEVICE)
    q, k, v, weight = torch.randn(4, sum(packed.lengths), 4, 80, device=DEVICE, dtype=torch.float64)
    core = SegmentAttention(tiny_config())
    results = []
    for kind, function in (
        (torch.float64, lambda *x: by_runs(*x, packed.lengths).flatten(1)),
        (dtype, lambda *x: core(*x, packed)),
    ):
        inputs = [x.to(kind).detach().requires_grad_() for x in (q, k, v)]
        output = function(*inputs)
        (output * weight.to(kind).flatten(1)).sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for expected, actual in zip(*results, strict=True):
        # Rounding of the inputs, of the shares and of the result, relative to the largest entry.
        assert (actual.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()
