"""What an engine refuses, before any work. Messages name the tools' flags beside the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_pg_size

from megatron_msa.errors import ConfigError
from megatron_msa.inference.cache import CacheFormat
from megatron_msa.inference.paged_rows import pages_for

_SHARE_OF_FREE_MEMORY = 0.9
"""The rest is for the activations of a chunk."""


@dataclass(frozen=True)
class Limits:
    """What the sequences of one engine may be.

    Attributes:
        max_tokens: of a sequence in the cache.
        cache_tokens: that the pages of all sequences hold together.
        position_limit: positions that the model's position embedding was made for.
        vocab_size: ids below this exist.
        placeholder_ids: ids that stand for images or videos, which a prompt of text cannot have.
    """

    max_tokens: int
    cache_tokens: int
    position_limit: int
    vocab_size: int
    placeholder_ids: frozenset[int] = frozenset()

    def check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Refuse what `generate` cannot do.

        Raises:
            ConfigError: names the prompt.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens (--max-new-tokens) is {max_new_tokens}; it must be 1 or more")
        for number, prompt in enumerate(prompts):
            self._check_tokens(f"prompt {number}", prompt)
            self._check_length(f"prompt {number}", len(prompt), max_new_tokens)

    def check_sequences(self, sequences: Sequence[Sequence[int]], start: Sequence[int] | None) -> None:
        """Refuse what `log_probabilities` cannot do.

        Raises:
            ConfigError: names the sequence.
        """
        if start is not None and len(start) != len(sequences):
            raise ConfigError(
                f"start has {len(start)} entries for {len(sequences)} sequences; give one for each"
            )
        for number, sequence in enumerate(sequences):
            self._check_tokens(f"sequence {number}", sequence)
            self._check_length(f"sequence {number}", len(sequence), 0)

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ConfigError(f"{name} is empty; give at least one token (for example the tokenizer's eod)")
        for place, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"token {place} of {name} is {token}; the model knows 0 to {self.vocab_size - 1}. Use "
                    "the tokenizer that the checkpoint was trained with"
                )
            if token in self.placeholder_ids:
                raise ConfigError(
                    f"token {place} of {name} is {token}, the placeholder of an image or video; inference "
                    "takes text only"
                )

    def _check_length(self, name: str, given: int, new: int) -> None:
        total = given + new
        made_of = f"{name} has {given:,} tokens" + (f" and {new:,} more are asked for" if new else "")
        if total > self.position_limit:
            raise ConfigError(
                f"{made_of}, but the model was trained for positions up to {self.position_limit:,} "
                "(--max-position-embeddings of the checkpoint); shorten it, or raise position_limit "
                "(--position-limit) to use the rotary embedding beyond what it was trained for"
            )
        if total > self.max_tokens:
            raise ConfigError(
                f"{made_of}, but the cache holds {self.max_tokens:,} per sequence; shorten it or raise "
                "max_tokens"
            )
        if total > self.cache_tokens:
            raise ConfigError(
                f"{made_of}, but the whole cache holds {self.cache_tokens:,}; shorten it or raise "
                "cache_tokens"
            )


def check_flags(options: argparse.Namespace) -> None:
    """Refuse numbers of the tools' flags before a checkpoint is loaded.

    Args:
        options: of a tool; flags that it does not have are not read.

    Raises:
        ConfigError: names the flag.
    """
    for name in ("max_new_tokens", "max_sequences", "prefill_chunk", "position_limit"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")


def check_engine(
    model: GPTModel,
    *,
    max_tokens: int,
    max_sequences: int,
    cache_tokens: int,
    prefill_chunk: int,
    position_limit: int,
) -> None:
    """Refuse sizes and layouts that no engine can be made of.

    Raises:
        ConfigError: says which.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("max_sequences (--max-sequences)", max_sequences),
        ("cache_tokens", cache_tokens),
        ("prefill_chunk (--prefill-chunk)", prefill_chunk),
        ("position_limit (--position-limit)", position_limit),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if model.position_embedding_type == "learned_absolute" and position_limit > model.max_sequence_length:
        raise ConfigError(
            f"position_limit (--position-limit) is {position_limit:,}, but the model has learned "
            f"{model.max_sequence_length:,} positions and has none beyond; use at most that"
        )
    stages = get_pg_size(model.pg_collection.pp)
    if stages > 1 or not (model.pre_process and model.post_process):
        raise ConfigError(
            f"the model is cut into {stages} pipeline stages; inference needs all layers on every rank: "
            "load the checkpoint with --pipeline-model-parallel-size 1 (any layout loads), and use tensor or "
            "expert parallelism if it does not fit"
        )
    if model.config.moe_expert_capacity_factor is not None:
        raise ConfigError(
            f"--moe-expert-capacity-factor is {model.config.moe_expert_capacity_factor}: experts would drop "
            "tokens depending on what else is in the chunk; load the checkpoint with "
            "moe_expert_capacity_factor=None"
        )


def check_memory(form: CacheFormat, *, cache_tokens: int, limit: int | None, device: torch.device) -> int:
    """The memory of the cache in bytes; refused where it is too much.

    Args:
        form: of the cache.
        cache_tokens: of all sequences together.
        limit: in bytes; None for nine tenths of what is free on the device.
        device: of the cache.

    Raises:
        ConfigError: the cache takes more than the limit.
    """
    needed = form.bytes_for(pages_for(cache_tokens, form.block_size))
    what = "the given limit"
    if limit is None:
        limit = int(_free_memory(device) * _SHARE_OF_FREE_MEMORY)
        what = f"{_SHARE_OF_FREE_MEMORY:.0%} of the free memory"
    if needed > limit:
        raise ConfigError(
            f"a cache of {cache_tokens:,} tokens at {form.bytes_per_token:,} bytes each takes "
            f"{needed / 2**30:.2f} GiB, and {what} is {limit / 2**30:.2f} GiB: use fewer sequences "
            "(--max-sequences) or tokens, rows in 8 bit (cache_dtype, index_key_dtype: --8bit-kv, "
            "--8bit-index-keys), or tensor parallelism"
        )
    return needed


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # asked on a CPU only

    return psutil.virtual_memory().available
