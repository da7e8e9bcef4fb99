"""Corrections to megatron-core 0.19.2 for every machine. Each does nothing once upstream is right."""

import argparse
import functools
import importlib.util
import os
from typing import Any

import torch

from megatron_msa.training import save_processes


def apply() -> None:
    """Apply all corrections. May be called more than once."""
    _allow_plain_python()
    _skip_helper_compilation()
    _load_torch_adam_state()
    save_processes.apply()


# Megatron's defaults that need a library: the module that must be there, and the values (argparse dest ->
# value) without it. Everything else that needs one is off by default: grouped GEMM, the MoE permute and
# router fusions, the precision-aware optimizer, FP8, CUDA graphs, overlap of tensor-parallel communication.
_WITHOUT: dict[str, dict[str, Any]] = {
    "transformer_engine": {"transformer_impl": "local", "apply_rope_fusion": False},
    "apex": {"no_persist_layer_norm": True},
    # Kernels of apex. Transformer Engine's layers have their own, but the output layer and the index branch
    # are Megatron's, which would refuse the flag.
    "fused_weight_gradient_mlp_cuda": {"gradient_accumulation_fusion": False},
    "scaled_masked_softmax_cuda": {"masked_softmax_fusion": False},
    # The default way of saving in the background is in this package.
    "nvidia_resiliency_ext": {"async_strategy": "mcore"},
}
_WITHOUT_A_GPU = ("nvidia_resiliency_ext",)
"""Of those, what also serves a machine without a GPU."""


def argument_defaults(*, has_gpu: bool) -> dict[str, Any]:
    """Megatron argument values (argparse dest -> value) for the libraries that are missing here."""
    values: dict[str, Any] = {}
    for module, without in _WITHOUT.items():
        usable = has_gpu or module in _WITHOUT_A_GPU
        if not usable or importlib.util.find_spec(module) is None:
            values |= without
    return values


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Let ``--help`` print: Megatron's text of --moe-paged-stash-buffer-size-factor-cuda holds a bare "%"."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def _allow_plain_python() -> None:
    """Started without torchrun, Megatron assumes one process but no address: give it one."""
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
    """Exact resume of the distributed optimizer over torch's own AdamW (no Transformer Engine, no apex).

    Megatron is made for FusedAdam, which counts steps per group. Torch counts per parameter, in a tensor
    called `step`, which 0.19.2 mishandles on loading.
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
        # 1. It reads `step` from the parameters' state, which is empty before the first step (an assertion).
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
        # 4. `step` is loaded already, but it takes it from the sharded tensors too: a KeyError
        #    (fully_reshardable), or the value before loading (dp_reshardable). It skips what is not a tensor.
        original_set_states(self, model_param, {**tensors, "step": None})

    state_dict._primes_state = True  # type: ignore[attr-defined]
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
