"""What an MSA layer measures while it trains: its KL loss and, on sampled steps, its selection's quality."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

QUALITY_NAMES = (
    "block_recall",
    "score_recall",
    "selection_entropy",
    "local_block_share",
    "first_block_share",
)


class LayerMetrics:
    """Sums of one layer since the last reset, kept on the device so that no step waits for them.

    `sums[name]` holds two numbers: the sum over (row, GQA group) pairs and their count. Both add up over
    tensor-parallel ranks (which own groups), context- and data-parallel ranks (which own rows) and
    microbatches.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, values: Tensor) -> None:
        """Add per-row values of shape [rows, groups]."""
        count = torch.full((), values.numel(), dtype=torch.float64, device=values.device)
        update = torch.stack([values.sum(dtype=torch.float64), count])
        self._accumulate(name, update)

    @torch.no_grad()
    def add_where(self, name: str, values: Tensor, rows: Tensor) -> None:
        """Add per-row values [rows, groups] of the rows where the mask ``rows`` [rows] is true."""
        selected = rows[:, None].expand_as(values)
        # where, not multiplication: a row that does not count may hold NaN.
        total = torch.where(selected, values.double(), 0.0).sum()
        self._accumulate(name, torch.stack([total, selected.sum(dtype=torch.float64)]))

    def reset(self) -> None:
        self.sums.clear()

    def _accumulate(self, name: str, update: Tensor) -> None:
        self.sums[name] = self.sums[name] + update if name in self.sums else update


def msa_layers(model: nn.Module | list[nn.Module]) -> Iterator[nn.Module]:
    """Every MSA attention layer of a model or of its pipeline chunks, in order."""
    for chunk in model if isinstance(model, list) else [model]:
        for module in chunk.modules():
            if isinstance(getattr(module, "metrics", None), LayerMetrics):
                yield module
