"""Lists of tensors for people: layers with equal tensors share a line."""

from __future__ import annotations

import re
from collections.abc import Iterable

Shape = tuple[int, ...]


def describe_tensors(tensors: Iterable[tuple[str, Shape]]) -> list[str]:
    """``name  [shape]`` per tensor; those that differ only in numbers in their names share a line.

    For example ``decoder.layers.{0-3}.mlp.linear_fc2.weight  [128, 384]  x 4``.
    """
    groups: dict[tuple[str, Shape], list[list[int]]] = {}
    for name, shape in tensors:
        numbers = [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        groups.setdefault((pattern, shape), []).append(numbers)
    lines = []
    for (pattern, shape), members in groups.items():
        name = pattern
        for position in zip(*members, strict=True):
            name = name.replace("#", _ranges(position), 1)
        count = f"  x {len(members)}" if len(members) > 1 else ""
        lines.append(f"{name}  {list(shape)}{count}")
    return lines


def _ranges(numbers: Iterable[int]) -> str:
    """``3``, ``{0-3}`` or ``{0,2-5}``."""
    ordered = sorted(set(numbers))
    parts: list[list[int]] = []
    for number in ordered:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    if len(ordered) == 1:
        return str(ordered[0])
    return "{" + ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) + "}"
