"""The adapter for lm-evaluation-harness, against its real base class and its real task runner."""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.harness import HarnessModel
from megatron_msa.evaluation.protocol import Tokens
from tests.evaluation.oracles import BYTES_END, ByteTokenizer, PairTokenizer

LONGEST = 40


class Alphabet:
    """Byte b is followed by b + 1 with 60 or 40 % of the probability, and by others with 0.1 %."""

    def __init__(self) -> None:
        self.longest = 0

    def generate(self, prompts, *, max_new_tokens, sampling=None, stop=None):
        self.longest = max([self.longest, *(len(prompt) + max_new_tokens for prompt in prompts)])
        return [[(prompt[-1] + 1 + n) % 256 for n in range(max_new_tokens)] for prompt in prompts]

    def log_probabilities(self, sequences, *, start=None):
        self.longest = max([self.longest, *map(len, sequences)])
        return [
            torch.tensor(
                [self.value(sequence, n) for n in range(max(first, 1), len(sequence))], dtype=torch.float32
            )
            for sequence, first in zip(sequences, start or [1] * len(sequences), strict=True)
        ]

    @staticmethod
    def value(sequence, n) -> float:
        if sequence[n] != (sequence[n - 1] + 1) % 256:
            return math.log(0.001)
        return math.log((0.6, 0.4)[sequence[n] % 2])


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture
def adapter() -> HarnessModel:
    return HarnessModel(Alphabet(), Tokens(ByteTokenizer()), LONGEST)


def test_continuations_have_their_probability_and_say_whether_they_are_greedy(adapter):
    pairs = [("xa", "b"), ("xa", "bc"), ("xb", "c"), ("xa", "c"), ("", "a"), ("x " * 50 + "a", "b")]
    found = adapter.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    values = [math.log(p) for p in (0.6, 0.24, 0.4, 0.001, 0.001, 0.6)]
    assert [value for value, _ in found] == pytest.approx(values)
    # "c" behind "b" has less than half of the probability, and decoding says that it is the maximum.
    assert [greedy for _, greedy in found] == [True, True, True, False, False, True]
    assert adapter._model.longest <= LONGEST


def test_whole_texts_are_scored_once_per_token_in_windows(adapter):
    text = "".join(chr(97 + n % 26) for n in range(95))
    (value,) = adapter.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    ids = [BYTES_END, *text.encode()]
    assert value == pytest.approx(sum(Alphabet.value(ids, n) for n in range(1, len(ids))), rel=1e-6)
    assert adapter._model.longest == LONGEST


class Recording(Alphabet):
    """Keeps what it scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: list[tuple[list[int], int]] = []

    def log_probabilities(self, sequences, *, start=None):
        self.scored += [(list(each), first) for each, first in zip(sequences, start, strict=True)]
        return super().log_probabilities(sequences, start=start)


def test_a_start_token_is_context_and_never_scored():
    """As models are trained: once before a text; what has nothing before it is scored behind it."""
    tokenizer, model = PairTokenizer(), Recording()
    adapter = HarnessModel(model, Tokens(tokenizer), LONGEST)
    text = tokenizer.tokenize("abcd")[1:-1]
    adapter.loglikelihood([request("loglikelihood", *pair) for pair in (("", "abcd"), ("ab", "cd"))])
    adapter.loglikelihood_rolling([request("loglikelihood_rolling", "abcd")])
    whole = [tokenizer.start, *text]
    assert model.scored == [(whole, 1), (whole, 2), (whole, 1)]


def test_replies_end_before_the_stop_text(adapter):
    requests = [
        request("generate_until", "a", {"until": ["zz", "f"], "max_gen_toks": 9}),
        request("generate_until", "a", {"until": "nothing", "max_gen_toks": 3}),
        request("generate_until", "b" * 100 + "a", {"until": [], "max_gen_toks": 4}),
    ]
    assert adapter.generate_until(requests) == ["bcde", "bcd", "bcde"]
    assert adapter._model.longest <= LONGEST
    with pytest.raises(ConfigError, match=r"samples at temperature 0\.7"):
        adapter.generate_until([request("generate_until", "a", {"do_sample": True, "temperature": 0.7})])


@pytest.mark.slow
def test_the_harness_runs_a_task_of_its_own(adapter, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": letter, "next": chr(ord(letter) + 1)}) + "\n" for letter in "acegi")
    )
    (tmp_path / "alphabet.yaml").write_text(
        f"""
task: alphabet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[next, '!', '?']}}}}"
target_delimiter: ""
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
    )
    found = simple_evaluate(
        model=adapter, tasks=["alphabet"], task_manager=TaskManager(include_path=str(tmp_path)), limit=5
    )
    assert found["results"]["alphabet"]["acc,none"] == 1.0
