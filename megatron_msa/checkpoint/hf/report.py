"""What a conversion did with every tensor."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT_NAME = "conversion_report.json"
_SHOWN = 8


@dataclass
class Report:
    """Names in ``mapped`` and ``initialised`` are Megatron's. Those in ``missing``, ``extra`` and ``ignored``
    are the source's: Hugging Face names on import, keys of the checkpoint on export.
    """

    direction: str
    family: str
    source: str
    target: str
    mapped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Megatron name -> its shape, the transform, and the Hugging Face tensors it is made of."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """Asked for to be allowed: what the target needs and the source lacks."""
    extra: dict[str, list[int]] = field(default_factory=dict)
    """Asked for to be allowed: what the source has and the target has no place for."""
    initialised: dict[str, list[int]] = field(default_factory=dict)
    ignored: dict[str, list[int]] = field(default_factory=dict)
    """Buffers that are no parameters, and training state."""
    copied: dict[str, list[int]] = field(default_factory=dict)
    """Tensors taken from the source folder of an export unchanged."""
    padding_rows: int = 0
    """Rows by which Megatron's vocabulary is larger, zero on import and dropped on export."""
    megatron_parameters: int = 0
    hf_parameters: int = 0
    """In tensors that Megatron's model has, too."""

    def count(self, megatron: dict[str, tuple[int, ...]], hf: dict[str, tuple[int, ...]]) -> None:
        """Fill in the totals."""
        self.megatron_parameters = sum(map(math.prod, megatron.values()))
        self.hf_parameters = sum(map(math.prod, hf.values()))

    def write(self, folder: Path) -> None:
        """As JSON."""
        text = json.dumps(asdict(self), indent=1)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    def describe(self) -> str:
        """A short table; lists are cut, the JSON has all of them."""
        lines = [f"{self.direction}: {self.source} -> {self.target} ({self.family})"]
        lines.append(f"{'':<14}{'tensors':>9}{'parameters':>18}")
        lines.append(f"{'mapped':<14}{len(self.mapped):>9}{self._mapped_parameters():>18,}")
        for title in ("missing", "initialised", "extra", "copied", "ignored"):
            tensors: dict[str, list[int]] = getattr(self, title)
            lines.append(f"{title:<14}{len(tensors):>9}{sum(map(math.prod, tensors.values())):>18,}")
        lines.append(f"{'Megatron':<14}{'':>9}{self.megatron_parameters:>18,}")
        if self.hf_parameters:
            lines.append(f"{'Hugging Face':<14}{'':>9}{self.hf_parameters:>18,}")
        if self.padding_rows:
            lines.append(f"vocabulary: {self.padding_rows} rows of padding in Megatron's")
        for title in ("missing", "initialised", "extra"):
            tensors = getattr(self, title)
            shown = [f"    {name} {shape}" for name, shape in list(tensors.items())[:_SHOWN]]
            if len(tensors) > _SHOWN:
                shown.append(f"    ... and {len(tensors) - _SHOWN} more in {REPORT_NAME}")
            if shown:
                lines += [f"{title}:", *shown]
        return "\n".join(lines)

    def verification_memory(self) -> str:
        """What `--verify` is about to need: both models in fp32."""
        gib = 4 * (self.megatron_parameters + self.hf_parameters) / 2**30
        return f"verifying: both models in fp32 take about {gib:.1f} GiB"

    def _mapped_parameters(self) -> int:
        return sum(math.prod(entry["shape"]) for entry in self.mapped.values())
