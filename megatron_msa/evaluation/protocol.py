"""What an evaluation needs of a model and of a tokenizer; nothing here knows how either is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor


class LanguageModel(Protocol):
    """`megatron_msa.inference.engine.InferenceEngine` is one."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Any = None,
        stop: set[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, greedily chosen; a token of ``stop`` ends a sequence."""
        ...

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], *, start: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Per sequence log P(token[i] | tokens[:i]) for i >= max(start, 1), in nats, fp32 on the CPU."""
        ...


class MegatronTokenizer(Protocol):
    """The part of Megatron's text tokenizers that is used."""

    vocab_size: int
    eod: int | None

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...


class Tokens:
    """Text to ids and back.

    Some tokenizers put a start token before every text or an end token behind it. The start token stays,
    once, because models are trained with it; an end token is cut off, because a prompt is not finished.
    """

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = int(tokenizer.vocab_size)
        self.end: int | None = None if tokenizer.eod is None else int(tokenizer.eod)

    @cached_property
    def start(self) -> list[int]:
        """What stands before every text: a start token, or nothing."""
        return self.encode("")

    def encode(self, text: str) -> list[int]:
        ids = [int(token) for token in self._tokenizer.tokenize(text)]
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def encode_bare(self, text: str) -> list[int]:
        """The ids of the text alone, without the start token."""
        ids, length = self.encode(text), len(self.start)
        return ids[length:] if ids[:length] == self.start else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.detokenize([token for token in ids if token != self.end])

    def continued(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, and where the continuation begins.

        They are tokenized together, as in training: a tokenizer may join characters across the seam. Then the
        continuation begins with the joined token.
        """
        before, whole = self.encode(prompt), self.encode(prompt + continuation)
        shared = 0
        while shared < min(len(before), len(whole) - 1) and before[shared] == whole[shared]:
            shared += 1
        return whole, shared
