"""Names in a distributed checkpoint: index branches, and layers that are stored together or one by one.

Megatron stores layers that are all of one kind as one tensor ``decoder.layers.NAME`` with the layer as its
first axis, others as ``decoder.layers.N.NAME``. Optimizer state of a parameter is called
``optimizer.state.exp_avg.PARAMETER`` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Container

from megatron.core.dist_checkpointing.gpt_checkpoint_interop import _prepend_gpt_layer_axis
from megatron.core.dist_checkpointing.mapping import ShardedBase

INDEX_BRANCH = re.compile(r"(?P<branch>(decoder|mtp)\.layers\..*self_attention\.index_branch\.)")
"""Searched in a name: ``branch`` is the common start of the names of one index branch's parameters."""
OPTIMIZER_STATE = re.compile(r"(?P<state>(chained_\d+\.)?optimizer\.state\.\w+\.)(?P<parameter>.*)")
_ONE_LAYER = re.compile(r"\bdecoder\.layers\.(?P<layer>\d+)\.")


def layer_of(key: str) -> int | None:
    """The decoder layer, counted from 0, that a name is about; None for all of them, or none."""
    match = _ONE_LAYER.search(key)
    return None if match is None else int(match["layer"])


def stacked(key: str) -> str:
    """The name under which a tensor of one layer is found in the tensor of all layers."""
    return _ONE_LAYER.sub("decoder.layers.", key)


def stacks_layers(key: str) -> bool:
    """Whether this is the name of a tensor of all layers."""
    return key.startswith("decoder.layers.") and layer_of(key) is None


def is_stored(key: str, stored: Container[str]) -> bool:
    """Whether a checkpoint has a tensor, by itself or together with those of the other layers."""
    return key in stored or stacked(key) in stored


def read_from_stack(entry: ShardedBase, num_layers: int) -> ShardedBase:
    """Turn the request for a tensor of one layer into one for its part of the tensor of all layers."""
    layer = layer_of(entry.key)
    assert layer is not None, entry.key
    entry.key = stacked(entry.key)
    # Megatron's own way of reading layers of a GPT model into one with other layers between them.
    return _prepend_gpt_layer_axis(entry, layer, num_layers)
