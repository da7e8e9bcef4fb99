"""`--msa-init-index`: continue from a dense GQA checkpoint, with index branches that it does not have.

Megatron's strict load stays in charge of everything else. Before it runs, what belongs to a missing index
branch (parameters and their optimizer state) is taken out of the request; afterwards the parameters get their
initial values and the optimizer its copies of them. An index branch that the checkpoint has is loaded, never
initialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import print_rank_0
from torch import Tensor, nn

from megatron_msa.attention.index_initialization import attention_heads, derive
from megatron_msa.attention.self_attention import MSASelfAttention
from megatron_msa.checkpoint.index_keys import (
    INDEX_BRANCH,
    OPTIMIZER_STATE,
    is_stored,
    layer_of,
    read_from_stack,
    stacks_layers,
)
from megatron_msa.checkpoint.inspection import tensor_shapes
from megatron_msa.checkpoint.tensor_list import describe_tensors
from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError
from megatron_msa.training.phase_control import (
    NOTABLE_EXCESS,
    largest_excess,
    optimizer_parts,
    parameter_pairs,
)


class IndexBranchStart:
    """Initialises the index branches that the loaded checkpoint lacks.

    Args:
        method: --msa-init-index.
        config: of the model.
        rotary_dims: number of leading dimensions of a head that the rotary embedding turns.
    """

    def __init__(self, method: str, config: MSATransformerConfig, rotary_dims: int) -> None:
        self.method = method
        self.config = config
        self.rotary_dims = rotary_dims
        self._checkpoint: Path | None = None
        self._missing: dict[int, Tensor] = {}
        """id of a parameter that the checkpoint does not have -> its value from the model's construction."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        """Names and global shapes of those."""
        self._optimizer: Any = None
        """Megatron's request for the optimizer's state; None if it is not loaded, or complete."""

    def before_load(self, checkpoint: Path, request: dict[str, Any]) -> None:
        """Take missing index branches out of what is about to be loaded, in place.

        Args:
            checkpoint: folder of one torch_dist checkpoint.
            request: Megatron's sharded state dict.

        Raises:
            ConfigError: something else is missing, or a part of an index branch.
        """
        found = tensor_shapes(checkpoint)
        self._checkpoint = checkpoint
        states = [name for name in request if name.startswith("model") or name == "optimizer"]
        incomplete = _incomplete_branches(request, states, found)
        if incomplete:
            raise ConfigError(
                f"the checkpoint {checkpoint} has a part of these index branches only, which is neither "
                f"loaded nor initialised: {', '.join(incomplete)}"
            )

        is_stack = any(stacks_layers(key) for key in found)

        def resolve(entry: Any) -> Any:
            if not isinstance(entry, ShardedBase):
                return entry
            match = INDEX_BRANCH.search(entry.key)
            if match is not None and not is_stored(f"{match['branch']}linear_index_k.weight", found):
                if not OPTIMIZER_STATE.match(entry.key) and isinstance(entry.data, nn.Parameter):
                    self._missing[id(entry.data)] = entry.data.detach().clone()
                    self._shapes[entry.key] = entry.global_shape
                return LocalNonpersistentObject(entry.data)
            if is_stack and layer_of(entry.key) is not None:
                return read_from_stack(entry, self.config.num_layers)
            return entry

        for name in states:
            dict_list_map_inplace(resolve, request[name])
        missing = sorted(
            {tensor.key for name in states for tensor in _tensors(request[name]) if tensor.key not in found}
        )
        if missing:
            raise ConfigError(
                f"the checkpoint {checkpoint} lacks {len(missing)} tensors besides index branches, and only "
                f"those are initialised: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
            )

        # Megatron cannot put local entries back into lists that are otherwise loaded, only into dicts.
        if self._missing and "optimizer" in request:
            self._optimizer = request["optimizer"]
            request["optimizer"] = _lists_as_dicts(self._optimizer)

    def after_load(self, loaded: dict[str, Any]) -> None:
        """Give what was loaded the form that was asked for, in place."""
        if self._optimizer is not None:
            loaded["optimizer"] = _with_lists_of(self._optimizer, loaded["optimizer"])

    @torch.no_grad()
    def finish(self, model: list[nn.Module], optimizer: MegatronOptimizer | None) -> None:
        """Set the initial values, once model and optimizer are loaded; prints what was initialised."""
        for chunk in model:
            # The distributed optimizer's parameters are views of the model's, and are loaded as zeros.
            for parameter in chunk.parameters():
                if id(parameter) in self._missing:
                    parameter.copy_(self._missing[id(parameter)])
            for layer in chunk.modules():
                if isinstance(layer, TransformerLayer) and self._lacks_branch(layer):
                    self._derive(layer)
        if optimizer is not None and self._missing:
            self._update_optimizer(optimizer)
        self._report()

    def _lacks_branch(self, layer: TransformerLayer) -> bool:
        attention = layer.self_attention
        return (
            self.method != "random"
            and isinstance(attention, MSASelfAttention)
            and id(attention.index_branch.linear_index_k.weight) in self._missing
        )

    def _derive(self, layer: TransformerLayer) -> None:
        attention, config = layer.self_attention, self.config
        tp = attention.pg_collection.tp
        no_rope = config.no_rope_freq and config.no_rope_freq[layer.layer_number - 1]
        heads = attention_heads(
            config,
            qkv=_gathered(attention.linear_qkv.weight, tp),
            input_norm=layer.input_layernorm.weight,
            q_norm=getattr(attention.q_layernorm, "weight", None),
            k_norm=getattr(attention.k_layernorm, "weight", None),
            rotary_dims=0 if no_rope else self.rotary_dims,
        )
        branch = attention.index_branch
        values = derive(self.method, heads, branch.head_dim)
        # Every rank computes the same; but no two libraries promise the same signs of eigenvectors.
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for tensor in (values.query, values.key):
            torch.distributed.broadcast(tensor, group=group, group_src=0)
        branch.linear_index_q.weight.copy_(values.query.chunk(tp.size())[tp.rank()].flatten(0, 1))
        branch.linear_index_k.weight.copy_(values.key)
        shift = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        for norm, gain in (
            (branch.index_q_layernorm, values.query_gain),
            (branch.index_k_norm, values.key_gain),
        ):
            if getattr(norm, "weight", None) is not None:
                norm.weight.fill_(gain - shift)

    def _update_optimizer(self, optimizer: MegatronOptimizer) -> None:
        """Give the optimizer the new values of its fp32 copies; those of other parameters stay as loaded."""
        if self._optimizer is None:
            optimizer.reload_model_params()
            return
        betas = optimizer.param_groups[0].get("betas")  # those of the checkpoint, whatever the flags say
        if betas is not None and (excess := largest_excess(*betas)) >= NOTABLE_EXCESS:
            print_rank_0(
                "WARNING: the index branches start without moments at the optimizer's step count, and so "
                f"without Adam's bias correction: with betas {betas} their first updates are up to "
                f"{excess:.1f} times too large; consider a smaller --msa-indexer-lr, or --no-load-optim"
            )
        for part in optimizer_parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                for parameter in part.model_param_group_index_map:
                    if id(parameter) in self._missing:
                        _set_shard(part, parameter)
            elif part.optimizer is not None:
                for parameter, main in parameter_pairs(part):
                    if id(parameter) in self._missing and main is not parameter:
                        main.copy_(parameter)

    def _report(self) -> None:
        if self._checkpoint is None:
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._shapes)
        tensors = {name: shape for part in gathered for name, shape in part.items()}
        if not tensors:
            print_rank_0(
                f"--msa-init-index: {self._checkpoint} has its index branches, which are loaded as they are"
            )
            return
        parameters = sum(torch.Size(shape).numel() for shape in tensors.values())
        print_rank_0(
            f"--msa-init-index: initialised {len(tensors)} tensors of index branches ({parameters:,} "
            f"parameters, {self.method}), which the checkpoint does not have:"
        )
        for line in describe_tensors(sorted(tensors.items())):
            print_rank_0(f"  {line}")


def _incomplete_branches(
    request: dict[str, Any], states: list[str], found: dict[str, tuple[int, ...]]
) -> list[str]:
    """Index branches of which the checkpoint has some parameters and lacks others."""
    stored: dict[str, set[bool]] = {}
    for name in states:
        for entry in nested_values(request[name]) if name != "optimizer" else ():
            match = INDEX_BRANCH.search(entry.key) if isinstance(entry, ShardedTensor) else None
            if match is not None:
                stored.setdefault(match["branch"], set()).add(is_stored(entry.key, found))
    return [branch for branch, answers in stored.items() if len(answers) > 1]


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict; a factory stands for those it builds."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            yield from _tensors(entry.build())
        elif isinstance(entry, ShardedTensor):
            yield entry


def _lists_as_dicts(state: Any) -> Any:
    if isinstance(state, list):
        state = dict(enumerate(state))
    return {k: _lists_as_dicts(v) for k, v in state.items()} if isinstance(state, dict) else state


def _with_lists_of(pattern: Any, state: Any) -> Any:
    """Undo `_lists_as_dicts`: lists where ``pattern`` has lists."""
    if isinstance(pattern, list):
        return [_with_lists_of(entry, state.get(number, {})) for number, entry in enumerate(pattern)]
    if isinstance(pattern, dict):
        return state | {k: _with_lists_of(v, state[k]) for k, v in pattern.items() if k in state}
    return state


def _gathered(weight: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The rows of all tensor-parallel ranks."""
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weight.detach().contiguous(), group=group)
    return torch.cat(parts)


def _set_shard(optimizer: DistributedOptimizer, parameter: Tensor) -> None:
    """Copy this rank's part of a parameter to the optimizer."""
    part = optimizer._get_model_param_range_map(parameter)["param"]
    values = parameter.detach().flatten()[part.start : part.end].float()
    # What is not a tensor is left alone.
    states = dict.fromkeys(optimizer.optimizer_state_keys)
    optimizer._set_main_param_and_optimizer_states(parameter, {**states, "param": values})
