"""Mapping tables: which Hugging Face tensors a tensor of Megatron's model is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_msa.checkpoint.hf.transforms import TRANSFORMS, Transform
from megatron_msa.errors import ConfigError

_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")


class Part(NamedTuple):
    """A Hugging Face tensor, or one entry of the first dimension of a stacked one."""

    name: str
    entry: int | None = None

    def __str__(self) -> str:
        return self.name if self.entry is None else f"{self.name}[{self.entry}]"


@dataclass(frozen=True)
class Rule:
    """One line of a mapping table, read in both directions.

    Attributes:
        megatron: name in Megatron's model, with ``{layer}`` and ``{expert}`` (counted from 0, over the
            whole model).
        hf: the Hugging Face names with the same placeholders; ``name[{expert}]`` is an entry of a tensor
            in which the experts are stacked.
        transform: name of a transform of `transforms.TRANSFORMS`.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: str = "copy"

    @property
    def functions(self) -> Transform:
        return TRANSFORMS[self.transform]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        escaped = re.escape(self.megatron).replace(r"\{", "{").replace(r"\}", "}")
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", escaped))

    def parts(self, name: str) -> list[Part] | None:
        """What the Megatron tensor ``name`` is made of; None if the rule is not about it."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        parts = []
        for template in self.hf:
            text = template.format(**match.groupdict())
            indexed = _INDEXED.fullmatch(text)
            parts.append(Part(indexed["name"], int(indexed["index"])) if indexed else Part(text))
        return parts


class Mapped(NamedTuple):
    """A Megatron tensor with its rule."""

    rule: Rule
    parts: list[Part]


def map_names(rules: Iterable[Rule], names: Iterable[str], family: str) -> dict[str, Mapped]:
    """The rule and the Hugging Face parts of each Megatron tensor.

    Raises:
        ConfigError: a tensor that no rule is about.
    """
    rules = list(rules)
    mapped, unmapped = {}, []
    for name in names:
        found = [Mapped(rule, parts) for rule in rules if (parts := rule.parts(name)) is not None]
        assert len(found) <= 1, f"several rules of {family} are about {name}"
        if found:
            mapped[name] = found[0]
        else:
            unmapped.append(name)
    if unmapped:
        raise ConfigError(
            f"{family} has no place for {len(unmapped)} tensors of the Megatron model: "
            f"{', '.join(unmapped[:4])}{', ...' if len(unmapped) > 4 else ''}"
        )
    return mapped
