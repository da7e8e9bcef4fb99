"""Parameter groups of an optimizer across a load, when the index branch's learning rate changes.

Megatron recognises a group of a checkpoint by its settings, learning rates included, and wants as many of
them as the run has. A run that gives the index branch its own rate (--msa-indexer-lr), another one, or none
any more then fails to load. Apart from the rates the groups are equal, and so is what the checkpoint keeps
for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_msa.errors import ConfigError

Group = dict[str, Any]
_RATES = ("max_lr", "min_lr")


class SavedGroups:
    """Takes the run's groups out of a request, and puts those of the checkpoint in their order afterwards.

    Args:
        request: Megatron's sharded state dict; changed in place.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._groups: dict[tuple[Any, ...], list[Group]] = {}
        for path, parent in _parents(request.get("optimizer"), ("optimizer",)):
            self._groups[path] = parent.pop("param_groups")

    def restore(self, loaded: dict[str, Any]) -> None:
        """Complete the loaded state dict in place.

        Raises:
            ConfigError: the checkpoint has no group of this kind.
        """
        for path, groups in self._groups.items():
            parent: Any = loaded
            for name in path:
                parent = parent.get(name, {})
            saved = parent.get("param_groups", [])
            parent["param_groups"] = [_restored(group, saved) for group in groups]


def _parents(state: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any]]]:
    if not isinstance(state, dict):
        return
    if isinstance(state.get("param_groups"), list):
        yield path, state
        return
    for name, value in state.items():
        yield from _parents(value, (*path, name))


def _restored(group: Group, saved: list[Group]) -> Group:
    """The checkpoint's group that is the run's, or else the one that differs from it in the rates only."""
    for ignored in ((), _RATES):
        keys = [key for key in param_group_identifier_keys if key not in ignored]
        for candidate in saved:
            if all(_value(candidate, key) == _value(group, key) for key in keys):
                result = candidate | {key: group[key] for key in _RATES if key in group}
                if "params" in group:
                    params = group["params"]
                    wrapped = isinstance(params, LocalNonpersistentObject)
                    result["params"] = params.unwrap() if wrapped else params
                return result
    settings = {key: _value(group, key) for key in param_group_identifier_keys}
    raise ConfigError(
        f"the optimizer of the checkpoint has no parameter group like {settings} (other optimizer settings, "
        "or another number of expert-parallel ranks); add --no-load-optim to start with a new one"
    )


def _value(group: Group, key: str) -> Any:
    return group.get(key, group.get(f"pre_{key}"))
