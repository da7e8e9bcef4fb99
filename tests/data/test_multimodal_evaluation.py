"""The evaluation with images, on a model whose answers are known: it reads the digit from the first pixel."""

import math
from argparse import Namespace

import numpy
import pytest
import torch
from torch import nn

from megatron_msa.data.multimodal.encode import Document
from megatron_msa.data.multimodal.format import Sample, Text, Visual
from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.multimodal import (
    answer_accuracy,
    conditioned_perplexity,
    exchange_images,
    needle_sample,
    next_token_logits,
)
from megatron_msa.evaluation.multimodal_command import letter_tokens, needles, read_objects
from tests.data.multimodal_samples import EOD, IMAGE, ByteTokenizer, encoder, picture

VOCABULARY = 260


class Reader(nn.Module):
    """Expects the digit in an image's first value behind "=", with probability ``sure``; all else evenly."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.sure = sure

    def forward(self, tokens, positions, mask, visual_input=None):
        assert positions.tolist() == [list(range(tokens.shape[1]))]
        logits = torch.zeros(1, tokens.shape[1], VOCABULARY)
        if visual_input is not None:
            digit = ord("0") + int(visual_input.patches[0, 0])
            value = math.log(self.sure * (VOCABULARY - 1) / (1 - self.sure))
            logits[0, tokens[0] == ord("="), digit] = value
        return logits * self.scale


def captioned(digit: int, shown: int | None = None, tokens: int = 1, *, pixels: bool = True) -> Document:
    """`[image] = digit` with an image that shows a digit."""
    shown = digit if shown is None else shown
    ids = [*[IMAGE] * tokens, ord("="), ord("0") + digit, EOD]
    grid = torch.tensor([[1, 2, 2 * tokens]])
    patches = torch.full((4 * tokens, 12), float(shown)) if pixels else None
    return Document(f"{digit}", numpy.array(ids), grid, patches)


def test_logits_are_about_the_next_token():
    logits = next_token_logits(Reader(0.9), captioned(7))
    assert logits.shape == (3, VOCABULARY)
    assert int(logits[1].argmax()) == ord("7")


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_accuracy_counts_the_answers_that_are_right(wrong):
    documents = [captioned(number, shown=number + (number < wrong)) for number in range(5)]
    answers = [ord(digit) for digit in "0123456789"]
    assert answer_accuracy(Reader(0.9), documents, answers) == (5 - wrong) / 5


def test_a_model_without_pixels_is_no_better_than_chance():
    documents = [captioned(number, pixels=False) for number in range(10)]
    answers = [ord(digit) for digit in "0123456789"]
    assert answer_accuracy(Reader(0.9), documents, answers) == 1 / 10  # all equal: it says 0


def test_images_are_exchanged_among_documents_of_the_same_sizes():
    documents = [captioned(1), captioned(2, tokens=2), captioned(3), captioned(4, pixels=False), captioned(5)]
    exchanged = [
        (int(right.key), int(wrong.key), int(wrong.patches[0, 0]))
        for right, wrong in exchange_images(documents)
    ]
    # The only one with two tokens and the one without pixels are left out.
    assert exchanged == [(1, 1, 3), (3, 3, 5), (5, 5, 1)]


def test_perplexity_with_own_and_with_other_images_is_the_models():
    sure = 0.9
    result = conditioned_perplexity(
        Reader(sure), [captioned(1), captioned(2), captioned(3, tokens=2)], [IMAGE]
    )
    # Two documents, three tokens each: "=" and the end are guessed among all, the digit is known or mistaken.
    even = 2 * math.log(VOCABULARY)
    assert result.tokens == 6
    assert result.left_out == 1
    assert result.own == pytest.approx(math.exp((even - math.log(sure)) / 3), rel=1e-5)
    mistaken = -math.log((1 - sure) / (VOCABULARY - 1))
    assert result.shuffled == pytest.approx(math.exp((even + mistaken) / 3), rel=1e-5)
    with pytest.raises(ConfigError, match="none of the 1 documents can exchange images"):
        conditioned_perplexity(Reader(sure), [captioned(1)], [IMAGE])


def test_objects_are_read_from_folders_named_after_them(tmp_path):
    with pytest.raises(ConfigError, match="has 0 folders with images"):
        read_objects(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(name.encode() + bytes([number]))
    (tmp_path / "empty").mkdir()
    assert read_objects(tmp_path) == {"cat": [b"cat\0", b"cat\1"], "dog": [b"dog\0", b"dog\1"]}


class Joining(ByteTokenizer):
    """Has a token for "tA"."""

    def tokenize(self, text: str) -> list[int]:
        return [200] if text == "tA" else super().tokenize(text)


def test_letters_behind_names_need_tokens_of_their_own():
    samples = encoder()
    samples._tokenizer = Joining()
    assert letter_tokens(samples, ["cat", "dog"], "AB") == [ord("A"), ord("B")]
    with pytest.raises(ConfigError, match=r"to the letter A behind cat, t \(tokens \[65, 200\]\)"):
        letter_tokens(samples, ["cat", "t"], "AB")


class Chooser(nn.Module):
    """Knows objects by their pixels, and answers the letter of the image that shows what is asked for."""

    def __init__(self, objects):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        samples = {name: Sample(name, (Visual((images[0],)),)) for name, images in objects.items()}
        self.patches = {
            name: encoder().decode(encoder().measure(each)).patches for name, each in samples.items()
        }

    def forward(self, tokens, positions, mask, visual_input=None):
        shown = [
            next(name for name, patches in self.patches.items() if torch.equal(patches, each))
            for each in visual_input.patches.split(4)
        ]
        asked = bytes(tokens[0, -4:-1].tolist()).decode()  # the name before the last letter
        logits = torch.zeros(1, tokens.shape[1], VOCABULARY)
        if asked in shown:
            logits[0, -2, ord("A") + shown.index(asked)] = 1
        return logits * self.scale


def test_a_model_that_sees_finds_every_needle_and_is_misled_by_others_images():
    objects = {name: [picture(4, 4, seed)] for seed, name in enumerate(["cat", "dog", "hen"])}
    options = Namespace(images=[2, 3], questions=12, filler="the", seed=1)
    found = needles(Chooser(objects), encoder(), objects, options)
    for each, images in zip(found, (2, 3), strict=True):
        assert (each["images"], each["questions"], each["chance"]) == (images, 12, 1 / images)
        assert each["accuracy"] == 1
        assert each["others_images"] < 0.8
    options.images = [4]
    with pytest.raises(ConfigError, match=r"--images is \[4\]; with 3 objects between 2 and 3"):
        needles(Chooser(objects), encoder(), objects, options)


def test_a_needle_document_asks_where_its_objects_are():
    images = [picture(4, 4, seed) for seed in range(3)]
    objects = list(zip(["seven", "two", "nine"], images, strict=True))
    sample = needle_sample("k", objects, ["x", "y", "z"], asked=["nine", "seven", "nine", "seven"])
    assert sample.pieces == (
        *(Visual((images[0],)), Text("A x ")),
        *(Visual((images[1],)), Text("B y ")),
        *(Visual((images[2],)), Text("C z ")),
        Text("nineC sevenA nineC sevenA"),
    )
    measured = encoder().measure(sample)
    assert int(measured.tokens[-2]) == ord("A")
    for wrong in (["eight"], ["two"]):
        with pytest.raises(ConfigError, match="only those can be asked for"):
            needle_sample("k", [*objects, ("two", images[0])], ["x"] * 4, asked=wrong)
