"""Models that read their prompt: one answers right, one wrong. They know the wording of the tasks alone."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BYTES_END = 256


class ByteTokenizer:
    """Megatron's interface over UTF-8 bytes."""

    vocab_size = 257
    eod = BYTES_END

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class PairTokenizer(ByteTokenizer):
    """Joins two characters into a token, puts a start token in front and an end token behind, as some do."""

    vocab_size = 70000
    start = 65999

    def tokenize(self, text: str) -> list[int]:
        data = text.encode() + b"\0" * (len(text.encode()) % 2)
        pairs = [256 + data[n] * 256 + data[n + 1] for n in range(0, len(data), 2)]
        return [self.start, *pairs, BYTES_END]

    def detokenize(self, ids: list[int]) -> str:
        values = (token - 256 for token in ids if token not in (self.start, BYTES_END))
        return bytes(byte for value in values for byte in divmod(value, 256) if byte).decode(errors="replace")


def magic_of(prompt: str) -> list[str]:
    """Values of the keys that the last line asks for, in either wording."""
    asked = prompt[prompt.rfind("\n") + 1 :]
    if found := re.fullmatch(r"magic ([A-Z]+)", asked):
        return re.findall(rf"^magic {found[1]}(\d+)$", prompt, re.MULTILINE)
    keys = re.search(r"The magic numbers? of (.+) (?:is|are)$", asked)
    assert keys, asked
    return [
        value
        for key in keys[1].split(" and ")
        for value in re.findall(rf"^One of the magic numbers of {key} is: (\d+)\.$", prompt, re.MULTILINE)
    ]


def variables_of(prompt: str) -> list[str]:
    value = re.findall(r"variables have the value (\d+),", prompt)[-1]
    known = re.findall(rf"^VAR (\w+) = {value}$", prompt, re.MULTILINE)
    for name in known:
        known += re.findall(rf"^VAR (\w+) = VAR {name}$", prompt, re.MULTILINE)
    return known


def common_of(prompt: str) -> list[str]:
    counts = Counter(re.findall(r"\d+\. (\w+)", prompt))
    return [each for each, _ in counts.most_common(10)]


def frequent_of(prompt: str) -> list[str]:
    counts = Counter(word for word in re.findall(r"\b[a-z]{6}\b", prompt[: prompt.rfind("\nThe 3 most")]))
    return [each for each, _ in counts.most_common(3)]


def capital_of(prompt: str) -> list[str]:
    country = re.findall(r"What is the capital of (\w+)\?", prompt)[-1]
    return re.findall(rf"The capital of {country} is (\w+)\.", prompt)


ANSWERERS: dict[str, Callable[[str], list[str]]] = {
    "needle": magic_of,
    "multi_key": magic_of,
    "multi_value": magic_of,
    "multi_query": magic_of,
    "variable_tracking": variables_of,
    "common_words": common_of,
    "frequent_words": frequent_of,
    "question_answering": capital_of,
}


class Oracle:
    """Implements `LanguageModel` by reading."""

    def __init__(self, task: str, tokenizer: ByteTokenizer | None = None, *, lies: bool = False) -> None:
        self.answers = ANSWERERS[task]
        self.tokenizer = tokenizer or ByteTokenizer()
        self.lies = lies

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: None = None,
        stop: set[int] | None = None,
    ) -> list[list[int]]:
        replies = []
        for prompt in prompts:
            text = self.tokenizer.detokenize(list(prompt))
            said = ", ".join(self.answers(text))
            # The lie holds every right answer inside of a longer word, which must not count.
            reply = f"x{said.replace(', ', 'x, x')}x" if self.lies else f"{said}\nmagic AAA0000"
            replies.append(self.tokenizer.tokenize(reply)[:max_new_tokens])
        return replies

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], *, start: Sequence[int] | None = None
    ) -> list[Tensor]:
        assert start is not None
        found = []
        for sequence, first in zip(sequences, start, strict=True):
            whole = self.tokenizer.detokenize(list(sequence))
            cut = re.match(r".*(?:=| is| are|:|magic [A-Z]+)(?= ?\w+$)|.*(?:Answer:)", whole, re.DOTALL)
            assert cut, whole
            # A token at the seam may hold the prompt's last character, too.
            assert 0 <= cut.end() - len(self.tokenizer.detokenize(list(sequence[:first]))) <= 1
            is_right = whole[cut.end() :].strip() in self.answers(whole[: cut.end()])
            found.append(torch.full((len(sequence) - first,), -0.1 if is_right != self.lies else -1.0))
        return found
