"""Made-up words and numbers, as many as a task asks for, the same for the same random state."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

_ONSETS = [*"bdfghjklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pl", "sk", "st", "tr"]
_VOWELS = "aeiou"
_CODAS = ["", "", "", "l", "m", "n", "r", "s"]


def word(rng: random.Random, syllables: int = 3) -> str:
    """One word. Of two syllables there are a million, of three a billion."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def distinct(make: Callable[[], str], count: int, taken: set[str] | None = None) -> list[str]:
    """``count`` different results of ``make()``, none of which is in ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        candidate = make()
        if taken is None or candidate not in taken:
            found[candidate] = None
    return list(found)


def digits(rng: random.Random, count: int) -> str:
    """A number of exactly ``count`` digits."""
    return rng.choice(string.digits[1:]) + "".join(rng.choices(string.digits, k=count - 1))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_uppercase) -> str:
    return "".join(rng.choices(alphabet, k=count))
