"""What the conversion commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_msa.errors import ConfigError

_SHOWN = 5


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, strictness and verification."""
    parser.add_argument("--save", type=Path, required=True, help="Target folder; must not exist.")
    parser.add_argument(
        "--allow-extra",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="Leave out tensors of the source that the target has no place for if their name contains one of "
        "these texts. Others are an error.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Run both models on the same random tokens in fp32 and print the largest difference of their "
        "logits. Needs memory for both: 8 bytes per parameter.",
    )
    parser.add_argument("--verify-tokens", type=int, default=256, metavar="N", help="Default: %(default)s.")


def is_allowed(name: str, patterns: Iterable[str], *, regex: bool = False) -> bool:
    """Whether a text is part of the name, or a regular expression is all of it."""
    if regex:
        return any(re.fullmatch(pattern, name) for pattern in patterns)
    return any(pattern in name for pattern in patterns)


def refuse(tensors: dict[str, list[int]], what: str, advice: str) -> None:
    """Raise a ConfigError that lists the tensors, if there are any."""
    if not tensors:
        return
    listed = ", ".join(f"{name} {shape}" for name, shape in list(tensors.items())[:_SHOWN])
    more = f", and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
    raise ConfigError(f"{what} ({len(tensors)}): {listed}{more}. {advice}")
