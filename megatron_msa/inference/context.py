"""What the two kinds of forward pass over the cache share: the settings of the model's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron.core.inference.config import InferenceConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_pg_rank, get_pg_size
from msa_kernels import Backend

from megatron_msa.attention.cached_attention import KeyCacheContext
from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.errors import ConfigError
from megatron_msa.inference.cache import PagedCache
from megatron_msa.phases import Phase

Attention = Literal["as trained", "dense", "sparse"]
"""Each layer as its phase says; full attention in all; selected blocks in all MSA layers."""


@dataclass(frozen=True)
class AttentionSettings:
    """What the attention operators need to know of a model.

    Attributes:
        num_selected_blocks: of each query and group (k).
        selects_blocks: per layer, whether it attends to selected blocks only.
        softmax_scale: of the main scores; None for 1 / sqrt(d).
        backend: of the operators.
        cp_group: the context-parallel process group.
        row_multiple: ranks that share the rows of hidden states under sequence parallelism.
    """

    num_selected_blocks: int
    selects_blocks: Sequence[bool]
    softmax_scale: float | None
    backend: Backend
    cp_group: Any
    row_multiple: int

    @classmethod
    def of(cls, model: GPTModel, attention: Attention) -> AttentionSettings:
        """The settings of a model's configuration, phase and process groups.

        Raises:
            ConfigError: an attention that the model does not have.
        """
        config = model.config
        return cls(
            num_selected_blocks=config.msa_num_selected_blocks,
            selects_blocks=_selecting_layers(model, attention),
            softmax_scale=config.softmax_scale,
            backend=config.msa_backend,
            cp_group=model.pg_collection.cp,
            row_multiple=get_pg_size(model.pg_collection.tp) if config.sequence_parallel else 1,
        )

    @property
    def cp_size(self) -> int:
        """Context-parallel ranks."""
        return get_pg_size(self.cp_group)

    @property
    def cp_rank(self) -> int:
        """This rank's place among them."""
        return get_pg_rank(self.cp_group)


def _selecting_layers(model: GPTModel, attention: Attention) -> list[bool]:
    if attention not in get_args(Attention):
        raise ConfigError(f"attention is {attention!r}; allowed: 'as trained', 'dense', 'sparse'")
    phases = {layer.layer_number: layer.phase for layer in msa_layers(model.decoder)}
    if attention == "sparse" and not phases:
        raise ConfigError("attention is 'sparse' but the model has no MSA layer; use 'as trained' or 'dense'")
    return [
        attention != "dense"
        and number in phases
        and (attention == "sparse" or phases[number] is Phase.SPARSE)
        for number in range(1, model.config.num_layers + 1)
    ]


class CacheContext(KeyCacheContext):
    """A Megatron inference context around a `PagedCache`, for one kind of forward pass.

    To Megatron it is a dynamic context: new tokens of all sequences come as one batch of one.
    """

    num_speculative_tokens = 0

    def __init__(self, cache: PagedCache, settings: AttentionSettings, max_sequence_length: int) -> None:
        super().__init__(InferenceConfig(materialize_only_last_token_logits=False))
        self.cache = cache
        self.settings = settings
        self.max_sequence_length = max_sequence_length
        """Positions that Megatron makes a rotary table for."""

    def is_static_batching(self) -> bool:
        """See `BaseInferenceContext`."""
        return False

    def selects_blocks(self, layer_number: int) -> bool:
        """See `KeyCacheContext`."""
        return self.settings.selects_blocks[layer_number - 1]
