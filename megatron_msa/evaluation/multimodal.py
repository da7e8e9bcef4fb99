"""What a model makes of images: perplexity with the right and with wrong images, and a visual needle.

Every document is a forward pass of its own, without a cache; answers are single tokens.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_msa.data.multimodal.encode import Document
from megatron_msa.data.multimodal.format import Sample, Text, Visual
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.inputs import VisualInput, placeholder_mask

LETTERS = string.ascii_uppercase


@torch.no_grad()
def next_token_logits(model: nn.Module, document: Document) -> Tensor:
    """What the model expects behind each token of a document.

    Args:
        model: on one device, in evaluation mode: `MultimodalGPT`; `GPTModel` for documents without patches.
        document: n + 1 tokens.

    Returns:
        fp32 [n, vocabulary] on the CPU; row t is about token t + 1.
    """
    device = next(model.parameters()).device
    tokens = torch.from_numpy(document.tokens[:-1])[None].to(device)
    positions = torch.arange(tokens.shape[1], device=device)[None]
    visuals = {}
    if document.patches is not None:
        dtype = next(model.parameters()).dtype
        visuals["visual_input"] = VisualInput(document.patches, document.grid_thw).to(device, dtype)
    return model(tokens, positions, None, **visuals)[0].float().cpu()


def answer_accuracy(model: nn.Module, documents: Sequence[Document], answers: Sequence[int]) -> float:
    """How often the model finds the last token of a document, before its end, most likely of all answers.

    Args:
        model: see `next_token_logits`.
        documents: end with their answer and the end-of-document token.
        answers: tokens that can be the answer.
    """
    candidates = torch.tensor(answers)
    right = 0
    for document in documents:
        logits = next_token_logits(model, document)[-2, candidates]
        right += answers[int(logits.argmax())] == int(document.tokens[-2])
    return right / len(documents)


@dataclass(frozen=True)
class ConditionedPerplexity:
    """Perplexity per text token.

    Attributes:
        own: with each document's own images.
        shuffled: with those of another document. Near ``own``: the model does not look at the images.
        tokens: text tokens that were predicted.
        left_out: documents whose images no other document could have taken.
    """

    own: float
    shuffled: float
    tokens: int
    left_out: int


def conditioned_perplexity(
    model: nn.Module, documents: Sequence[Document], placeholder_ids: Sequence[int]
) -> ConditionedPerplexity:
    """Perplexity of the text that follows images, with the right images and with wrong ones.

    Args:
        model: see `next_token_logits`.
        documents: with images; those with images of the same sizes exchange them.
        placeholder_ids: tokens that are not predicted.

    Raises:
        ConfigError: no two documents have images of the same sizes.
    """
    exchanged = exchange_images(documents)
    if not exchanged:
        raise ConfigError(
            f"none of the {len(documents)} documents can exchange images with another: their numbers and "
            "sizes all differ"
        )
    tokens, own, shuffled = 0, 0.0, 0.0
    for right, wrong in exchanged:
        count, loss = _text_loss(model, right, placeholder_ids)
        tokens += count
        own += loss
        shuffled += _text_loss(model, wrong, placeholder_ids)[1]
    return ConditionedPerplexity(
        own=math.exp(own / tokens),
        shuffled=math.exp(shuffled / tokens),
        tokens=tokens,
        left_out=len(documents) - len(exchanged),
    )


def exchange_images(documents: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Each document beside one with its text and the images of the next document of the same image sizes.

    Documents that have no images, or whose sizes no other has, are left out.
    """
    by_sizes: dict[tuple[tuple[int, ...], ...], list[Document]] = {}
    for document in documents:
        if document.patches is not None:
            sizes = tuple(tuple(grid) for grid in document.grid_thw.tolist())
            by_sizes.setdefault(sizes, []).append(document)
    return [
        (document, replace(document, patches=group[(number + 1) % len(group)].patches))
        for group in by_sizes.values()
        if len(group) > 1
        for number, document in enumerate(group)
    ]


def needle_sample(
    key: str, objects: Sequence[tuple[str, bytes]], fillers: Sequence[str], *, asked: Sequence[str]
) -> Sample:
    """A long document of images, each before its letter, and questions where an object is.

    `[image]A filler [image]B filler ... 7B 3A`

    The letter stands behind its image because a model copies most easily what follows the thing it looks for.

    Args:
        key: of the sample.
        objects: what each image shows (different things), and the image file.
        fillers: text behind each image.
        asked: names of the objects to ask for, in this order and also twice; the document ends with the last
            answer.

    Raises:
        ConfigError: an object is there twice or not at all, or there are more images than letters.
    """
    names = [name for name, _ in objects]
    if len(set(names)) < len(names) or not set(asked) <= set(names) or len(names) > len(LETTERS):
        raise ConfigError(
            f"a document shows {names} and asks for {list(asked)}: at most {len(LETTERS)} objects, each "
            "once, and only those can be asked for"
        )
    pieces: list[Text | Visual] = []
    for letter, (_, image), filler in zip(LETTERS, objects, fillers, strict=False):
        pieces += [Visual((image,)), Text(f"{letter} {filler} ")]
    answers = [f"{name}{LETTERS[names.index(name)]}" for name in asked]
    return Sample(key, (*pieces, Text(" ".join(answers))))


def _text_loss(model: nn.Module, document: Document, placeholder_ids: Sequence[int]) -> tuple[int, float]:
    """Number and loss (nats, summed) of the text tokens behind the first image."""
    targets = torch.from_numpy(document.tokens[1:])
    counts = ~placeholder_mask(targets, placeholder_ids)
    first = placeholder_mask(torch.from_numpy(document.tokens[:-1]), placeholder_ids).nonzero()
    counts[: int(first[0])] = False
    losses = nn.functional.cross_entropy(next_token_logits(model, document), targets, reduction="none")
    return int(counts.sum()), float(losses[counts].sum())
