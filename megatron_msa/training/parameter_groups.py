"""Parameter groups of an optimizer across a load, when the run divides its parameters in another way.

Megatron recognises a group of a checkpoint by its settings, learning rates included, and wants as many of
them as the run has, in the same places. Two things change that: the index branch gets its own learning rate
(--msa-indexer-lr), another one, or none any more; and with expert parallelism the experts have an optimizer
of their own, so a checkpoint saved with it lists two optimizers, one saved without it a single one. Apart
from the rates and the place the groups are equal, and so is what the checkpoint keeps for them: the moments
of a parameter are stored under its name, wherever its group stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_msa.errors import ConfigError

Group = dict[str, Any]
_RATES = ("max_lr", "min_lr")
_PLACE = ("is_expert_parallel",)


class SavedGroups:
    """Takes the run's groups out of a request, and puts those of the checkpoint in their places afterwards.

    Args:
        request: Megatron's sharded state dict; changed in place.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._groups: dict[tuple[Any, ...], list[Group]] = {}
        self._optimizers: dict[tuple[Any, ...], dict[Any, Any]] = {}
        """Of the optimizer around a list of groups: what it keeps that is no tensor (its sharding's name)."""
        for path, parent in _parents(request.get("optimizer"), ("optimizer",)):
            self._groups[path] = parent.pop("param_groups")
            *outer, _ = path
            around = _at(request, outer) if outer else {}
            self._optimizers[tuple(outer)] = {
                key: value for key, value in around.items() if isinstance(value, str)
            }

    def restore(self, loaded: dict[str, Any]) -> None:
        """Complete the loaded state dict in place.

        Raises:
            ConfigError: the checkpoint has no group of this kind.
        """
        if not self._groups:
            return
        found = list(_parents(loaded.get("optimizer"), ("optimizer",)))
        saved = [group for _, parent in found for group in parent["param_groups"]]
        if {path for path, _ in found} != set(self._groups):
            self._move(loaded, [path for path, _ in found])
        for path, groups in self._groups.items():
            parent = _at(loaded, path, create=True)
            parent["param_groups"] = [_restored(group, saved) for group in groups]

    def _move(self, loaded: dict[str, Any], found: list[tuple[Any, ...]]) -> None:
        """One optimizer where the checkpoint has two, or two where it has one.

        The tensors were read into the places of the request; only what is no tensor stands in others.
        """
        for path in found:
            if path not in self._groups:
                *outer, last = path
                _at(loaded, outer).pop(last)
        for path in {tuple(path[:-1]) for path in found} - self._optimizers.keys():
            _drop_plain(loaded, path)
        for path, plain in self._optimizers.items():
            _at(loaded, path, create=True).update(plain)


def _at(state: dict[Any, Any], path: Iterable[Any], *, create: bool = False) -> dict[Any, Any]:
    for name in path:
        state = state.setdefault(name, {}) if create else state[name]
    return state


def _drop_plain(loaded: dict[str, Any], path: tuple[Any, ...]) -> None:
    """Remove what is left of an optimizer that the run does not have, and its place if that is empty."""
    place = _at(loaded, path)
    for key in [key for key, value in place.items() if isinstance(value, str)]:
        del place[key]
    if not place and len(path) > 1:
        del _at(loaded, path[:-1])[path[-1]]


def _parents(state: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any]]]:
    if not isinstance(state, dict):
        return
    if isinstance(state.get("param_groups"), list):
        yield path, state
        return
    for name, value in state.items():
        yield from _parents(value, (*path, name))


def _restored(group: Group, saved: list[Group]) -> Group:
    """The checkpoint's group that is the run's, or else one that differs in the rates or the place only."""
    for ignored in ((), _RATES, _PLACE, (*_RATES, *_PLACE)):
        keys = [key for key in param_group_identifier_keys if key not in ignored]
        for candidate in saved:
            if all(_value(candidate, key) == _value(group, key) for key in keys):
                result = candidate | {key: group[key] for key in (*_RATES, *_PLACE) if key in group}
                if "params" in group:
                    params = group["params"]
                    wrapped = isinstance(params, LocalNonpersistentObject)
                    result["params"] = params.unwrap() if wrapped else params
                return result
    settings = {key: _value(group, key) for key in param_group_identifier_keys}
    raise ConfigError(
        f"the optimizer of the checkpoint has no parameter group like {settings} (other optimizer "
        "settings); add --no-load-optim to start with a new one"
    )


def _value(group: Group, key: str) -> Any:
    return group.get(key, group.get(f"pre_{key}"))
