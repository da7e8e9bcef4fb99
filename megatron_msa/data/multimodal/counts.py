"""What went into the sequences of a run, for its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Counts:
    """Sums over sequences.

    Attributes:
        sequences: of the model, multimodal and text.
        documents: multimodal samples in them.
        visuals: images and videos.
        visual_tokens: tokens that they became.
        padding_tokens: positions that no sample filled.
        skipped_samples: samples that could not be used and were left out.
    """

    sequences: int = 0
    documents: int = 0
    visuals: int = 0
    visual_tokens: int = 0
    padding_tokens: int = 0
    skipped_samples: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class DataCounts:
    """What was read for training since the last log line."""

    counts: Counts = field(default_factory=Counts)

    def add(self, counts: Counts) -> None:
        self.counts.add(counts)

    def take(self, device: torch.device | int | str) -> dict[str, int]:
        """The sums over all processes, then from 0 again. Collective over all of them."""
        names = list(vars(self.counts))
        sums = torch.tensor([float(getattr(self.counts, name)) for name in names], dtype=torch.float64)
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
        self.counts = Counts()
        return {name: int(value) for name, value in zip(names, sums.tolist(), strict=True)}
