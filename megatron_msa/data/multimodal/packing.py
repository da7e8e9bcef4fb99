"""Several samples -> one training sequence.

Each sample is a document: attention, positions and MSA blocks begin anew with it, as for text (blocks are
counted from the start of a document, so nothing has to be aligned). A sample of n + 1 tokens takes n
positions: its tokens but the last are the inputs, its tokens but the first the labels. So no label reaches
into the next document. What is left of the sequence is one document of end-of-document tokens without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_msa.data.multimodal.counts import Counts
from megatron_msa.data.multimodal.encode import Document
from megatron_msa.model.vision.inputs import without_visual_targets


class _HasLength(Protocol):
    @property
    def length(self) -> int: ...


def choose[T: _HasLength](samples: Sequence[T], capacity: int) -> list[list[T]]:
    """Share samples out into sequences: each, from the longest, into the fullest sequence that has room.

    Every sample is in exactly one sequence. Equal lengths keep their order.
    """
    packs: list[list[T]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -sample.length):
        fitting = [number for number, left in enumerate(room) if left >= sample.length]
        if fitting:
            best = min(fitting, key=lambda number: room[number])
        else:
            best = len(packs)
            packs.append([])
            room.append(capacity)
        packs[best].append(sample)
        room[best] -= sample.length
    # In the order in which the samples came, so that a sequence does not always begin with its longest.
    place = {id(sample): number for number, sample in enumerate(samples)}
    packs = [sorted(pack, key=lambda sample: place[id(sample)]) for pack in packs]
    return sorted(packs, key=lambda pack: place[id(pack[0])])


@dataclass
class TrainingSequence:
    """One sequence of the model, multimodal or text.

    Attributes:
        values: what Megatron's `GPTDataset` returns for a sample: tokens, labels, loss_mask, position_ids
            [S], cu_seqlens int32 [S + 1] (offsets, then S), max_seqlen int32 [].
        grid_thw: int64 [visuals, 3].
        patches: float32 [patches, values of a patch]; None without visuals, or where pixels are not needed.
        counts: of this sequence, and of samples skipped on the way to it.
        keys: of its samples.
    """

    values: dict[str, Tensor]
    grid_thw: Tensor
    patches: Tensor | None
    counts: Counts
    keys: tuple[str, ...] = ()


def join(
    documents: Sequence[Document], *, seq_length: int, filler: int, placeholder_ids: Sequence[int]
) -> TrainingSequence:
    """Lay documents end to end.

    Args:
        documents: at least one; together they take at most ``seq_length`` positions.
        seq_length: S, tokens of a sequence.
        filler: token of the unused positions.
        placeholder_ids: tokens that are never predicted.
    """
    lengths = [len(document.tokens) - 1 for document in documents]
    missing = seq_length - sum(lengths)
    inputs = [torch.from_numpy(document.tokens[:-1]) for document in documents]
    targets = [torch.from_numpy(document.tokens[1:]) for document in documents]
    padding = torch.full((missing,), filler, dtype=torch.int64)
    tokens, labels = torch.cat([*inputs, padding]), torch.cat([*targets, padding])
    loss_mask = torch.ones(seq_length)
    loss_mask[seq_length - missing :] = 0
    if missing:
        lengths.append(missing)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    # As long as the text data's, so that sequences can be collated.
    cu_seqlens = torch.full((seq_length + 1,), seq_length, dtype=torch.int32)
    cu_seqlens[: len(offsets)] = offsets
    visual = [document.patches for document in documents if document.patches is not None]
    visual_tokens = sum(int((tokens == each).sum()) for each in placeholder_ids)
    grids = torch.cat([document.grid_thw for document in documents])
    return TrainingSequence(
        values={
            "tokens": tokens,
            "labels": labels,
            "loss_mask": without_visual_targets(loss_mask, labels, placeholder_ids),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32),
        },
        grid_thw=grids,
        patches=torch.cat(visual) if visual else None,
        counts=Counts(
            sequences=1,
            documents=len(documents),
            visuals=len(grids),
            visual_tokens=visual_tokens,
            padding_tokens=missing,
        ),
        keys=tuple(document.key for document in documents),
    )
