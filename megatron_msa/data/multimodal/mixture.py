"""Sequences of two sources by weight -> microbatches.

Of each rank's sequences number n is multimodal where floor((n + 1) w) > floor(n w), with w the share of
multimodal ones. So the shares are exact over every stretch, need no state, and all data-parallel ranks have
images in the same microbatches: none waits for another's encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch

from megatron_msa.data.multimodal.counts import Counts
from megatron_msa.data.multimodal.encode import grid_tensor
from megatron_msa.data.multimodal.packing import TrainingSequence
from megatron_msa.data.multimodal.visuals import refuse_placeholders


def multimodal_before(sequences: int, share: Fraction) -> int:
    """How many of a rank's first ``sequences`` sequences are multimodal."""
    return sequences * share.numerator // share.denominator


class TextSource:
    """A rank's sequences of a Megatron dataset, in the order of Megatron's sampler.

    Args:
        dataset: returns a sample's tensors by its number.
        rank: of the data-parallel group.
        ranks: its size.
        placeholder_ids: tokens that text must not hold.
    """

    def __init__(
        self, dataset: Sequence[dict[str, Any]], *, rank: int, ranks: int, placeholder_ids: Sequence[int]
    ) -> None:
        self._dataset = dataset
        self._rank, self._ranks = rank, ranks
        self._placeholder_ids = placeholder_ids

    def __getitem__(self, number: int) -> TrainingSequence:
        values = self._dataset[number * self._ranks + self._rank]
        refuse_placeholders(values["tokens"], self._placeholder_ids)
        return TrainingSequence(values, grid_tensor(()), None, Counts(sequences=1))


def mix(
    stream: Iterator[TrainingSequence], text: TextSource | None, share: Fraction, *, start: int = 0
) -> Iterator[TrainingSequence]:
    """The sequences of a rank.

    Args:
        stream: multimodal sequences from where reading goes on.
        text: the others; None with a share of 1.
        share: of multimodal sequences.
        start: sequences that the rank has read before.
    """
    number = start
    while True:
        seen = multimodal_before(number, share)
        if multimodal_before(number + 1, share) > seen:
            yield next(stream)
        else:
            assert text is not None
            yield text[number - seen]
        number += 1


_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen")


def collate(sequences: Sequence[TrainingSequence]) -> dict[str, Any]:
    """A microbatch: what torch's collation makes of text samples, and the visuals of all sequences in order.

    Returns:
        tokens, labels, loss_mask, position_ids [b, S]; cu_seqlens [b, S + 1]; max_seqlen [b]; grid_thw
        [visuals, 3]; patches [patches, values] or None.
    """
    batch: dict[str, Any] = {
        name: torch.stack([sequence.values[name] for sequence in sequences]) for name in _KEYS
    }
    patches = [sequence.patches for sequence in sequences if sequence.patches is not None]
    batch["grid_thw"] = torch.cat([sequence.grid_thw for sequence in sequences])
    batch["patches"] = torch.cat(patches) if patches else None
    return batch


def microbatches(
    sequences: Iterator[TrainingSequence], size: int, count: Callable[[Counts], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Group sequences.

    Args:
        sequences: of a rank.
        size: of a microbatch.
        count: called with the counts of every sequence.
    """
    while True:
        group = [next(sequences) for _ in range(size)]
        for sequence in group:
            if count is not None:
                count(sequence.counts)
        yield collate(group)
