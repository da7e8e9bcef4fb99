"""Which measurements an evaluation is made of: a cell is one of them, with all its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.tasks.registry import TASK_NAMES

PERPLEXITY = "perplexity"
SELECTION = "selection"
SERVING = "serving"
MEASUREMENTS = (*TASK_NAMES, PERPLEXITY, SELECTION, SERVING)
"""All that --tasks takes: questions, perplexity by position, the quality of the block selection, and the
arithmetic of serving costs."""

ATTENTION_MODES = ("msa", "dense")


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement.

    Attributes:
        attention: "msa", blocks in every MSA layer, or "dense", the same weights with full attention.
        task: one of `MEASUREMENTS`.
        length: tokens of prompt and reply together, or of the text.
        depth: of the needle, 0 to 1; None where nothing is placed.
    """

    attention: str
    task: str
    length: int
    depth: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cell:
        return cls(values["attention"], values["task"], int(values["length"]), values["depth"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells that are asked for, shortest lengths first: a job that runs out of time has the cheap ones.

    Raises:
        ConfigError: an unknown task or attention mode, no length, or a depth outside 0 to 1.
    """

    attention: Sequence[str]
    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("--tasks", self.tasks, MEASUREMENTS),
            ("--attention", self.attention, ATTENTION_MODES),
        ):
            if not given:
                raise ConfigError(f"{name} is empty; choose from {', '.join(allowed)}")
            for each in given:
                if each not in allowed:
                    raise ConfigError(f"{name} has {each!r}; there are {', '.join(allowed)}")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(
                f"--lengths is {list(self.lengths)}; give one or more lengths of 1 token or more"
            )
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(
                f"--depths is {list(self.depths)}; give shares of the context between 0 (start) and 1 (end)"
            )

    def cells(self) -> list[Cell]:
        """Each once."""
        return [
            Cell(attention, task, length, depth)
            for attention in dict.fromkeys(self.attention)
            for length in sorted(set(self.lengths))
            for task in dict.fromkeys(self.tasks)
            for depth in (sorted(set(self.depths)) if task == "needle" else [None])
            # Dense attention selects nothing, and serving costs compare both.
            if not (task == SELECTION and attention == "dense")
            if not (task == SERVING and attention != self.attention[0])
        ]


def evenly(count: int) -> list[float]:
    """``count`` depths from 0 to 1."""
    if count < 1:
        raise ConfigError(f"--num-depths is {count}; it must be 1 or more")
    return [0.5] if count == 1 else [round(n / (count - 1), 4) for n in range(count)]
