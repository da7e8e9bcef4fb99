"""What an image may change in a language model, and what a microbatch without images may not."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_msa.errors import ConfigError
from megatron_msa.model.multimodal import MultimodalGPT, let_encoder_idle
from megatron_msa.model.vision.inputs import VisualInput, placeholder_mask
from megatron_msa.model.vision.segments import cut_into_segments
from tests.attention.tiny import (
    initial_model,
    packed_documents,
    random_tokens,
    tiny_config,
    tiny_model,
)
from tests.vision.tiny import IMAGE, VIDEO, interleaved, random_visuals, run, tiny_vision


def multimodal(**changes: Any) -> MultimodalGPT:
    model = tiny_model(tiny_config(**changes), vision=tiny_vision())
    assert isinstance(model, MultimodalGPT)
    return model


def with_other_pixels(visuals: VisualInput, number: int) -> VisualInput:
    """The same visuals, but for the pixels of one."""
    counts = visuals.grid_thw.prod(dim=1)
    start = int(counts[:number].sum())
    patches = visuals.patches.clone()
    patches[start : start + int(counts[number])] *= -1.5
    return VisualInput(patches, visuals.grid_thw)


def changed_tokens(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(dim=-1)[0].nonzero().flatten().tolist()


class TestTextOnly:
    """The encoder is there, but the microbatch has no image."""

    def test_losses_and_gradients_are_those_of_the_text_model_to_the_bit(self) -> None:
        model = multimodal()
        text_model = tiny_model(tiny_config())
        assert type(text_model) is GPTModel
        backbone = {
            name: value for name, value in model.state_dict().items() if not name.startswith("vision_model.")
        }
        text_model.load_state_dict(backbone)
        tokens, _ = random_tokens()
        logits = run(model, tokens, None)
        expected = text_model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        assert torch.equal(logits, expected)
        for each in (logits, expected):
            each.logsumexp(-1).sum().backward()
        gradients = {name: each.grad for name, each in model.named_parameters()}
        for name, parameter in text_model.named_parameters():
            assert torch.equal(gradients[name], parameter.grad), name
        encoder = {name: grad for name, grad in gradients.items() if name.startswith("vision_model.")}
        assert len(encoder) == 35
        for name, gradient in encoder.items():
            # Zero, but there: the overlapped reduction of gradients waits for every parameter.
            assert gradient is not None, name
            assert not gradient.any(), name

    @pytest.mark.parametrize("mode", ["train", "freeze"])
    def test_the_encoder_runs_for_training_only_and_a_frozen_one_gets_no_gradient(self, mode: str) -> None:
        model = tiny_model(tiny_config(), vision=tiny_vision(vision_mode=mode))
        owners = {each for each in model.vision_model.modules() if [*each.parameters(recurse=False)]}
        called = set()
        for module in owners:
            # Megatron waits here for parameters that are gathered in the background.
            module.register_forward_pre_hook(lambda module, _: called.add(module))
        tokens, _ = random_tokens()
        with torch.no_grad():
            expected = run(model, tokens, None)
        assert called == set()
        logits = run(model, tokens, None)
        assert called == owners
        assert torch.equal(logits, expected)
        logits.sum().backward()
        for name, parameter in model.vision_model.named_parameters():
            trained = mode == "train" or name.startswith(("projector.", "merge."))
            assert parameter.requires_grad == trained, name
            assert (parameter.grad is not None) == trained, name
            assert parameter.grad is None or not parameter.grad.any(), name

    @pytest.mark.parametrize(
        ("flag", "waits"),
        [
            ({}, False),
            ({"overlap_grad_reduce": True}, True),
            ({"overlap_param_gather": True}, True),
            ({"context_parallel_size": 2}, True),
        ],
    )
    def test_the_encoder_is_idle_where_nothing_waits_for_it(self, flag: dict[str, Any], waits: bool) -> None:
        model = multimodal()
        flags = {"overlap_grad_reduce": False, "overlap_param_gather": False, "context_parallel_size": 1}
        let_encoder_idle([model], Namespace(**flags | flag))
        calls = []
        model.vision_model.register_forward_hook(lambda *_: calls.append(1))
        tokens, _ = random_tokens()
        run(model, tokens, None).sum().backward()
        assert len(calls) == waits
        gradients = [parameter.grad for parameter in model.vision_model.parameters()]
        assert [each is not None for each in gradients] == [waits] * len(gradients)

    def test_an_empty_list_of_visuals_is_no_visual(self) -> None:
        model = multimodal()
        tokens, _ = random_tokens(batch=1)
        none = VisualInput(torch.zeros(0, tiny_vision().patch_values), torch.zeros(0, 3, dtype=torch.long))
        assert torch.equal(run(model, tokens, none), run(model, tokens, None))

    def test_the_backbone_starts_with_the_text_models_values(self) -> None:
        models = []
        for vision in (None, tiny_vision()):
            torch.manual_seed(5)
            model_parallel_cuda_manual_seed(5, force_reset_rng=True)
            models.append(dict(initial_model(vision=vision).named_parameters()))
        assert models[0].keys() < models[1].keys()
        for name, parameter in models[0].items():
            assert torch.equal(parameter, models[1][name]), name


class TestVisibility:
    """Two packed documents; the second has two images, the first an image and a video of two segments."""

    grids = ((1, 2, 4), (4, 2, 2), (1, 4, 2), (1, 2, 4))

    def sample(self) -> tuple[Tensor, Any, list[int]]:
        first = interleaved(self.grids[:2], [3, 4, 5])
        second = interleaved(self.grids[2:], [2, 3, 6])
        tokens = torch.cat([first, second], dim=1)
        starts = [3, 3 + 2 + 4, first.shape[1] + 2, first.shape[1] + 2 + 2 + 3]
        return tokens, packed_documents([first.shape[1], second.shape[1]]), starts

    @pytest.mark.parametrize("number", range(4))
    def test_an_image_changes_its_place_and_what_follows_in_its_document(self, number: int) -> None:
        # A model without sparsity: every later token of the document sees the image.
        model = multimodal(msa_num_selected_blocks=64)
        tokens, documents, starts = self.sample()
        visuals = random_visuals(self.grids)
        before = run(model, tokens, visuals, packed_seq_params=documents)
        after = run(model, tokens, with_other_pixels(visuals, number), packed_seq_params=documents)
        ends = documents.cu_seqlens_q.tolist()
        end = ends[1] if number < 2 else ends[2]
        assert changed_tokens(before, after) == list(range(starts[number], end))

    def test_a_document_alone_gives_what_it_gives_in_the_pack(self) -> None:
        model = multimodal()
        tokens, documents, _ = self.sample()
        visuals = random_visuals(self.grids)
        packed = run(model, tokens, visuals, packed_seq_params=documents)
        middle = int(documents.cu_seqlens_q[1])
        split = sum(t * h * w for t, h, w in self.grids[:2])
        for part, patches, grids in (
            (slice(None, middle), visuals.patches[:split], self.grids[:2]),
            (slice(middle, None), visuals.patches[split:], self.grids[2:]),
        ):
            alone = run(model, tokens[:, part], VisualInput(patches, torch.tensor(grids)))
            assert torch.allclose(alone, packed[:, part], rtol=0, atol=1e-10)


def test_visual_embeddings_stand_where_their_placeholders_are() -> None:
    """Against words and visuals put together token by token, then run through the text model's layers."""
    model = multimodal()
    grids = [(1, 4, 4), (3, 2, 2), (1, 2, 2)]
    tokens, visuals = interleaved(grids, [0, 3, 1, 9]), random_visuals(grids)
    logits = run(model, tokens, visuals)
    features = iter(model.vision_model(visuals.patches, cut_into_segments(grids, model.vision)))
    words = model.embedding.word_embeddings.weight
    rows = [next(features) if token in (IMAGE, VIDEO) else words[token] for token in tokens[0].tolist()]
    assert next(features, None) is None
    positions = torch.arange(tokens.shape[1])[None]
    expected = GPTModel.forward(model, tokens, positions, None, torch.stack(rows)[:, None])
    assert torch.allclose(logits, expected, rtol=0, atol=1e-12)


def test_the_order_of_images_counts() -> None:
    model = multimodal(msa_num_selected_blocks=64)
    grids = [(1, 4, 2), (1, 4, 2)]
    tokens, visuals = interleaved(grids, [2, 2, 4]), random_visuals(grids)
    swapped = VisualInput(torch.cat(visuals.patches.chunk(2)[::-1]), visuals.grid_thw)
    assert changed_tokens(run(model, tokens, visuals), run(model, tokens, swapped)) == list(range(2, 12))


def test_sequences_of_a_batch_may_have_different_numbers_of_images() -> None:
    """Three, none and one: each sequence gives what it gives alone."""
    model = multimodal()
    grids = [[(1, 2, 2), (2, 4, 2), (1, 2, 6)], [], [(1, 4, 4)]]
    words = [[1, 2, 3, 4], [18], [5, 9]]
    rows = [interleaved(each, number) for each, number in zip(grids, words, strict=True)]
    tokens = torch.cat(rows)
    visuals = random_visuals([grid for each in grids for grid in each])
    together = run(model, tokens, visuals)
    start = 0
    for row, own in enumerate(grids):
        count = sum(t * h * w for t, h, w in own)
        one = VisualInput(visuals.patches[start : start + count], torch.tensor(own)) if own else None
        alone = run(model, tokens[row : row + 1], one)
        assert torch.allclose(together[row : row + 1], alone, rtol=0, atol=1e-10)
        start += count


def test_gradients_reach_encoder_projector_and_words_but_no_placeholder() -> None:
    model = multimodal()
    grids = [(1, 4, 4)]
    tokens, visuals = interleaved(grids, [4, 6]), random_visuals(grids)
    run(model, tokens, visuals).logsumexp(-1).sum().backward()
    for name, parameter in model.vision_model.named_parameters():
        # Keys get the same addition everywhere, which a softmax does not see.
        if "linear_qkv.bias" not in name:
            assert parameter.grad.abs().max() > 1e-9, name
    words = model.embedding.word_embeddings.weight.grad.abs().amax(dim=1)
    assert words[IMAGE] == 0
    seen = tokens[~placeholder_mask(tokens, (IMAGE, VIDEO))]
    assert (words[seen] > 0).all()


class TestRefusals:
    def test_another_number_of_placeholders_than_of_patches(self) -> None:
        model = multimodal()
        tokens = interleaved([(1, 4, 4)], [2, 2])
        with pytest.raises(ConfigError, match=r"4 placeholder tokens .* are 2 merged patches"):
            run(model, tokens, random_visuals([(1, 2, 4)]))
        with pytest.raises(ConfigError, match=r"4 placeholder tokens .* are 8 merged patches"):
            run(model, tokens, random_visuals([(1, 4, 4), (1, 4, 4)]))
        with pytest.raises(ConfigError, match=r"0 placeholder tokens .* are 4 merged patches"):
            run(model, random_tokens()[0].clamp(max=VIDEO - 1), random_visuals([(1, 4, 4)]))

    def test_a_grid_that_does_not_divide_by_the_merge(self) -> None:
        model = multimodal()
        with pytest.raises(ConfigError, match="1 x 3 x 4 patches"):
            run(model, interleaved([(1, 4, 4)], [2, 2]), random_visuals([(1, 3, 4)]))

    def test_patches_of_another_size_or_number_than_the_grids(self) -> None:
        model = multimodal()
        tokens, visuals = interleaved([(1, 4, 4)], [2, 2]), random_visuals([(1, 4, 4)])
        with pytest.raises(ConfigError, match=r"15 patches .* grids have 16"):
            run(model, tokens, VisualInput(visuals.patches[:15], visuals.grid_thw))
        with pytest.raises(ConfigError, match=r"of 95 values .* have 96"):
            run(model, tokens, VisualInput(visuals.patches[:, :95], visuals.grid_thw))

    @pytest.mark.parametrize(
        ("vision", "language", "message"),
        [
            ({"vision_image_token_id": None, "vision_video_token_id": None}, {}, "image-token-id is missing"),
            ({"vision_image_token_id": 64}, {}, "id 64 .* the vocabulary has 64 tokens"),
            ({}, {"mtp_num_layers": 1}, "multi-token prediction"),
            ({"vision_ffn_hidden_size": 37}, {"tensor_model_parallel_size": 2}, "37 is not divisible"),
        ],
    )
    def test_vision_parts_that_do_not_fit(self, vision: dict, language: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            initial_model(tiny_config(**language), vision=tiny_vision(**vision))
