"""The places where this project enters Megatron's training loop (megatron-core 0.19.2).

`pretrain()` offers no callback per step, so seven functions of `megatron.training.training` and one of
`megatron.training.checkpointing` are wrapped. Each wrapper calls Megatron's own function; nothing of it is
replaced.

- `get_megatron_optimizer_config`: adds the index branch's learning rate to the parameter groups;
- `setup_model_and_optimizer`: hands out the model and the optimizer once they exist;
- `train`: validates once before the first step of a fresh run, if asked;
- `train_step`: announces a step before it runs;
- `training_log`: called after every step, with what Megatron is about to print;
- `_load_global_dist_base_checkpoint`: may change what is asked of a checkpoint and what came of it;
- `evaluate_and_print_results` and `evaluate`: announce an evaluation and hand out its losses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron.training import checkpointing, training


class TrainingHooks(Protocol):
    """What the training loop calls."""

    def optimizer_overrides(self) -> dict[Any, Any]: ...
    def load(self, checkpoint: Path, request: dict[str, Any], read: Callable[[], dict[str, Any]]) -> None: ...
    def on_setup(self, model: list[Any], optimizer: Any) -> None: ...
    def evaluates_first(self) -> bool: ...
    def before_step(self, iteration: int) -> None: ...
    def log_step(self, megatron_log: Callable[[], Any], values: dict[str, Any]) -> Any: ...
    def before_evaluation(self, iteration: int, label: str) -> None: ...
    def after_evaluation(self, losses: dict[str, Any]) -> None: ...


def install(hooks: TrainingHooks) -> None:
    """Wrap Megatron's functions. Call once per process, before `pretrain()`."""
    _wrap("get_megatron_optimizer_config", lambda original: _optimizer_config(original, hooks))
    _wrap("setup_model_and_optimizer", lambda original: _setup(original, hooks))
    _wrap("train", lambda original: _train(original, hooks))
    _wrap("train_step", lambda original: _train_step(original, hooks))
    _wrap("training_log", lambda original: _training_log(original, hooks))
    _wrap("evaluate_and_print_results", lambda original: _evaluate_and_print(original, hooks))
    _wrap("evaluate", lambda original: _evaluate(original, hooks))
    _wrap("_load_global_dist_base_checkpoint", lambda original: _load(original, hooks), checkpointing)


def _wrap(name: str, make: Callable[[Any], Any], module: ModuleType = training) -> None:
    # Unwrap first: a second run in one process must not run the hooks of the first.
    original = inspect.unwrap(getattr(module, name))
    setattr(module, name, functools.wraps(original)(make(original)))


def _optimizer_config(original: Any, hooks: TrainingHooks) -> Any:
    def wrapper(args: Any) -> Any:
        config, overrides = original(args)
        return config, {**(overrides or {}), **hooks.optimizer_overrides()}

    return wrapper


def _setup(original: Any, hooks: TrainingHooks) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = original(*args, **kwargs)
        hooks.on_setup(model, optimizer)
        return model, optimizer, scheduler

    return wrapper


def _load(original: Any, hooks: TrainingHooks) -> Any:
    signature = inspect.signature(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        request = values["sharded_state_dict"]
        if values["rank0"] or request is None:  # only the arguments are read
            return original(*args, **kwargs)
        folder = checkpointing.get_checkpoint_name(
            values["load_dir"], values["iteration"], values["release"], return_base_dir=True
        )
        results: list[Any] = []

        def read() -> dict[str, Any]:
            results.extend(original(*args, **kwargs))
            return results[0]

        hooks.load(Path(folder), request, read)
        return tuple(results)

    return wrapper


def _train(original: Any, hooks: TrainingHooks) -> Any:
    signature = inspect.signature(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if hooks.evaluates_first():
            values = signature.bind(*args, **kwargs).arguments
            training.evaluate_and_print_results(
                "iteration 0",
                values["forward_step_func"],
                values["valid_data_iterator"],
                values["model"],
                0,
                values["process_non_loss_data_func"],
                values["config"],
                non_loss_data_func=values["non_loss_data_func"],
                pg_collection=values.get("pg_collection"),
                p2p_communicator=values.get("p2p_communicator"),
            )
        return original(*args, **kwargs)

    return wrapper


def _train_step(original: Any, hooks: TrainingHooks) -> Any:
    def wrapper(*args: Any, iteration: int, **kwargs: Any) -> Any:
        hooks.before_step(iteration)
        return original(*args, iteration=iteration, **kwargs)

    return wrapper


def _training_log(original: Any, hooks: TrainingHooks) -> Any:
    signature = inspect.signature(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = dict(signature.bind(*args, **kwargs).arguments)
        return hooks.log_step(lambda: original(*args, **kwargs), values)

    return wrapper


def _evaluate_and_print(original: Any, hooks: TrainingHooks) -> Any:
    signature = inspect.signature(original)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind(*args, **kwargs).arguments
        hooks.before_evaluation(values["iteration"], values["prefix"])
        return original(*args, **kwargs)

    return wrapper


def _evaluate(original: Any, hooks: TrainingHooks) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hooks.after_evaluation(result[0] or {})
        return result

    return wrapper
