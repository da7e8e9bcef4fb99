"""Corrections to megatron-core 0.19.2 that every machine needs. Each one is a no-op once upstream is right."""

import functools
import os
from typing import Any

import torch


def apply() -> None:
    """Apply all corrections. May be called more than once."""
    _allow_plain_python()
    _skip_helper_compilation()
    _load_torch_adam_state()


def argument_defaults_without_te() -> dict[str, Any]:
    """Megatron argument values (argparse dest -> value) for an installation without Transformer Engine and apex."""
    return {
        "transformer_impl": "local",
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }


def _allow_plain_python() -> None:
    """Megatron reads torchrun's variables but only has defaults for rank and world size: complete them for one process."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # 0: any free port


def _skip_helper_compilation() -> None:
    """The wheel ships the compiled dataset helper but no Makefile, and rank 0 exits when `make` fails."""
    import megatron.core.datasets.utils as dataset_utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    dataset_utils.compile_helpers = lambda: None


def _load_torch_adam_state() -> None:
    """Save and exact resume of the distributed optimizer over torch's own AdamW (no Transformer Engine, no apex).

    Megatron tests that pair with FusedAdam, which counts steps per group; torch counts per parameter, in a tensor
    called `step`, and 0.19.2 mishandles it in four ways when it loads.
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if distrib_optimizer.HAVE_APEX_OR_TE or getattr(DistributedOptimizer.state_dict, "_primes_state", False):
        return
    original_state_dict = DistributedOptimizer.state_dict
    original_load_state_dict = DistributedOptimizer.load_state_dict
    original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        # 1. It reads `step` from the state of the parameters, which before the first step is empty (an assertion).
        if isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
        return original_state_dict(self)

    @functools.wraps(original_load_state_dict)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        # 2. It copies into parameters that require gradients.
        with torch.no_grad():
            original_load_state_dict(self, state_dict)
        # 3. It gives one `step` tensor to all parameters, which then counts each of them in every step.
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    @functools.wraps(original_set_states)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # 4. After loading `step` it looks for it among the sharded tensors: a KeyError (fully_reshardable), or the
        #    value from before loading (dp_reshardable). What is not a tensor is left alone.
        original_set_states(self, model_param, {**tensors, "step": None})

    state_dict._primes_state = True  # type: ignore[attr-defined]
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
