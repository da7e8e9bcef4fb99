"""Training phases of MSA as a pure function of the iteration or of the tokens consumed.

==========  =====================  ============================  ===================
phase       main attention         KL alignment loss             what trains
==========  =====================  ============================  ===================
dense       full (plain GQA)       none                          backbone
index_only  full                   over all visible tokens       index branch
warmup      full                   over all visible tokens       both
sparse      the selected blocks    over the selected tokens      both
==========  =====================  ============================  ===================

Section 5 of the notes on arXiv 2606.13392: from scratch the paper warms up for 1.3 % of training, after a
conversion from GQA for 10 % of the added tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from itertools import pairwise

from megatron_msa.errors import ConfigError


class Phase(StrEnum):
    """What an MSA layer computes and which parameters the optimizer updates."""

    DENSE = "dense"
    INDEX_ONLY = "index_only"
    WARMUP = "warmup"
    SPARSE = "sparse"

    @property
    def has_kl(self) -> bool:
        """Whether the index branch runs and its KL loss is computed."""
        return self is not Phase.DENSE

    @property
    def trains_backbone(self) -> bool:
        return self is not Phase.INDEX_ONLY

    @property
    def trains_index_branch(self) -> bool:
        return self.has_kl


_MULTIPLIER = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_START = re.compile(r"(?P<number>\d[\d_]*(\.\d+)?)((?P<scale>[KMBT]?)(?P<unit>tok))?")


@dataclass(frozen=True)
class PhaseSchedule:
    """Phases in order with the absolute count at which each starts.

    Attributes:
        phases: at least one.
        starts: same length, strictly increasing, the first 0.
        unit: "iterations" or "tokens".
    """

    phases: tuple[Phase, ...]
    starts: tuple[int, ...]
    unit: str

    @classmethod
    def parse(cls, text: str | None) -> PhaseSchedule:
        """Parse ``phase@start,phase@start,...``; a start is an iteration or a token count like ``40Btok``.

        Raises:
            ConfigError: missing, unknown phase, malformed or unordered starts, or mixed units.
        """
        names = ", ".join(phase.value for phase in Phase)
        if not text:
            raise ConfigError(
                "--msa-schedule is missing; name the phases and where they start, for example "
                "'warmup@0,sparse@2000' (the paper warms up for 1.3 % of training from scratch and for 10 % "
                f"of the added tokens after a conversion). Phases: {names}"
            )
        phases: list[Phase] = []
        starts: list[int] = []
        units: set[str] = set()
        for part in text.split(","):
            name, _, start = part.strip().partition("@")
            if name not in {phase.value for phase in Phase}:
                raise ConfigError(f"--msa-schedule {text!r}: unknown phase {name!r}; allowed: {names}")
            match = _START.fullmatch(start)
            if match is None:
                raise ConfigError(
                    f"--msa-schedule {text!r}: {name!r} starts at {start!r}; write {name}@ITERATION or "
                    f"{name}@TOKENS with a unit, for example {name}@2000 or {name}@40Btok"
                )
            # Decimal, because in floating point 8.2 * 10**9 is not a whole number.
            count = Decimal(match["number"].replace("_", "")) * _MULTIPLIER[match["scale"] or ""]
            if count != int(count):
                raise ConfigError(f"--msa-schedule {text!r}: {start!r} is not a whole number")
            if count:  # 0 is the same in both units
                units.add("tokens" if match["unit"] else "iterations")
            phases.append(Phase(name))
            starts.append(int(count))
        if len(units) > 1:
            raise ConfigError(f"--msa-schedule {text!r} mixes iterations and tokens; use one unit throughout")
        if starts[0] != 0:
            raise ConfigError(f"--msa-schedule {text!r}: the first phase must start at 0, not {starts[0]}")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ConfigError(f"--msa-schedule {text!r}: each phase must start later than the one before it")
        return cls(tuple(phases), tuple(starts), units.pop() if units else "iterations")

    def phase_at(self, *, iteration: int, tokens: int) -> Phase:
        """The phase of the step that starts after ``iteration`` finished steps and ``tokens`` tokens."""
        count = iteration if self.unit == "iterations" else tokens
        current = self.phases[0]
        for phase, start in zip(self.phases, self.starts, strict=True):
            if count >= start:
                current = phase
        return current

    def check_length(self, *, train_iters: int, train_tokens: int) -> None:
        """Refuse a schedule whose last phase would never be reached.

        Raises:
            ConfigError: the last phase starts at or after the end of training.
        """
        total = train_iters if self.unit == "iterations" else train_tokens
        if self.starts[-1] >= total > 0:
            name = self.phases[-1].value
            raise ConfigError(
                f"--msa-schedule lets {name} start at {self.starts[-1]:,} {self.unit}, but training ends at "
                f"{total:,}. Start {name} earlier, leave it out, or train longer (--train-iters or "
                "--train-samples)"
            )

    def describe(self) -> list[str]:
        """One line per phase, for --dry-run and the log."""
        ends = [f"{start:,}" for start in self.starts[1:]] + ["end of training"]
        return [
            f"{phase.value:<10} from {start:>15,} to {end:>15} {self.unit}"
            for phase, start, end in zip(self.phases, self.starts, ends, strict=True)
        ]
