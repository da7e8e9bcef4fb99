"""What the full forward pass says, and what an engine says when its tokens are given to it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_msa.inference import engine as engine_module
from megatron_msa.inference.engine import InferenceEngine
from tests.attention.tiny import BLOCK, DEVICE, VOCABULARY, tiny_config, tiny_model

LENGTHS = [30, 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 41, 3]
"""Prompts that end before, at and behind the end of a page; the longest have more blocks than are chosen."""
NEW = 2 * BLOCK + 1
"""New tokens: every sequence comes over the end of a page, whatever its length."""
MIXTURE: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_layer_freq": [0, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


def model_of(**changes: Any) -> GPTModel:
    """A tiny model in fp64, in evaluation mode, whose experts have biases if it has experts."""
    model_changes = {name: changes.pop(name) for name in ("position_embedding_type",) if name in changes}
    model = tiny_model(tiny_config(**changes), **model_changes).eval()
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.copy_(0.3 * torch.randn_like(module.expert_bias))
    return model


def random_sequences(lengths: Sequence[int]) -> list[list[int]]:
    return [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]


@torch.no_grad()
def full_logits(model: GPTModel, tokens: Sequence[int]) -> Tensor:
    """Of the forward pass without a cache, [tokens, vocabulary]."""
    ids = torch.tensor([tokens], device=DEVICE)
    positions = torch.arange(len(tokens), device=DEVICE)[None]
    return model(ids, positions, None)[0]


def full_log_probabilities(model: GPTModel, tokens: Sequence[int]) -> Tensor:
    """Of every token but the first, fp64 on the CPU."""
    labels = torch.tensor(tokens[1:], device=DEVICE, dtype=torch.int64)
    return full_logits(model, tokens)[:-1].log_softmax(dim=-1).gather(1, labels[:, None])[:, 0].cpu()


def decoded_logits(
    engine: InferenceEngine, sequences: Sequence[Sequence[int]], new: int, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """The logits from which ``generate`` would choose the last ``new`` tokens of each sequence.

    The engine is given all but those, and instead of sampling each of them is fed. At each step the rows are
    told apart by the sequences they belong to, as `generate` orders them: nothing stops early here.
    """
    prompts = [list(sequence[:-new]) for sequence in sequences]
    given = [list(sequence[-new:]) for sequence in sequences]
    found: list[list[Tensor]] = [[] for _ in sequences]
    order = _Order(engine, monkeypatch)

    class Forced:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __call__(self, logits: Tensor) -> Tensor:
            numbers = order.numbers
            assert logits.shape[0] == len(numbers)
            tokens = []
            for row, number in enumerate(numbers):
                tokens.append(given[number][len(found[number])])
                found[number].append(logits[row].clone())
            return torch.tensor(tokens, device=logits.device)

    monkeypatch.setattr(engine_module, "Sampler", Forced)
    assert engine.generate(prompts, max_new_tokens=new) == given
    return [torch.stack(rows) for rows in found]


class _Order:
    """Which sequences the rows of the next logits belong to."""

    def __init__(self, engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: list[int] = []
        prefill, load = engine._prefill, engine._load_decode

        def recorded_prefill(admitted: Any) -> Tensor:
            self.numbers = [sequence.number for sequence in admitted]
            return prefill(admitted)

        def recorded_load(running: Any) -> Any:
            self.numbers = [sequence.number for sequence in running]
            return load(running)

        monkeypatch.setattr(engine, "_prefill", recorded_prefill)
        monkeypatch.setattr(engine, "_load_decode", recorded_load)
