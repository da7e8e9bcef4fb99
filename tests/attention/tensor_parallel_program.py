"""Two processes: one step of a model with and without tensor parallelism, from the same weights.

    torchrun --nproc-per-node 2 tests/attention/tensor_parallel_program.py RESULT.json FOLDER

Rank 0 writes, for each case, the largest error of each quantity relative to its largest entry.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a program, not by pytest

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_msa.phases import Phase  # noqa: E402
from tests.attention.tiny import (  # noqa: E402
    initial_model,
    kl_of,
    packed_documents,
    random_tokens,
    set_phase,
    tiny_config,
    tiny_model,
    token_losses,
)

RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
CASES: dict[str, tuple[Phase, dict[str, Any]]] = {
    "dense": (Phase.DENSE, {}),
    "warmup": (Phase.WARMUP, {}),
    "sparse": (Phase.SPARSE, {}),
    "sparse, per-token loss": (Phase.SPARSE, {"calculate_per_token_loss": True}),
    "sparse, no q and k norm": (Phase.SPARSE, {"qk_layernorm": False}),
    "sparse, norm over all heads": (Phase.SPARSE, {"msa_full_width_qk_norm": True}),
    "sparse, recomputed": (Phase.SPARSE, RECOMPUTE),
    "sparse, packed documents": (Phase.SPARSE, {}),
}


def build_groups(tensor_parallel: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)


def train_step(model: GPTModel, documents: PackedSeqParams | None) -> dict[str, Any]:
    """Losses, KL sums per layer and gradients of one step of Megatron's schedule."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    torch.manual_seed(11)
    batch = random_tokens(batch=1 if documents else 2)
    found = []

    def forward_step(batches: Iterator[None], wrapped_model: torch.nn.Module) -> tuple[Tensor, Any]:
        losses = token_losses(wrapped_model, *batch, documents)
        found.append(losses.detach())
        return losses, lambda output: (output.sum(), torch.tensor(output.numel(), dtype=torch.int), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=wrapped,
        num_microbatches=1,
        seq_length=batch[0].shape[1],
        micro_batch_size=batch[0].shape[0],
        forward_only=False,
    )
    kl = [torch.zeros(2, dtype=torch.float64) if sums is None else sums.clone() for sums in kl_of(model)]
    for sums in kl:
        torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return {"losses": found[0], "kl": torch.stack(kl), **gradients}


def shard(full: Tensor, parameter: Tensor, name: str) -> Tensor:
    """This rank's part of a tensor of the whole model."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    rank, axis = parallel_state.get_tensor_model_parallel_rank(), parameter.partition_dim
    if "linear_fc1" in name:  # gate and up projection, one above the other, are cut one by one
        return torch.cat([half.chunk(2, axis)[rank] for half in full.chunk(2, axis)], axis)
    return full.chunk(2, axis)[rank]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest over both ranks; an expected zero must be met exactly."""
    scale = expected.abs().max()
    error = (actual - expected).abs().max() / (scale if scale else 1)
    torch.distributed.all_reduce(error, op=torch.distributed.ReduceOp.MAX)
    return float(error)


def compare(phase: Phase, settings: dict[str, Any], documents: PackedSeqParams | None) -> dict[str, Any]:
    """Errors of tensor parallelism without and with sequence parallelism against a single rank's step."""
    build_groups(1)
    whole = tiny_model(tiny_config(**settings))
    set_phase(whole, phase)
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    expected = train_step(whole, documents)

    build_groups(2)
    errors = {}
    for sequence_parallel in (False, True):
        config = tiny_config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, **settings)
        model = tiny_model(config, parallel_output=False)
        set_phase(model, phase)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(shard(weights[name], parameter, name))
        step = train_step(model, documents)
        errors["sequence parallel" if sequence_parallel else "plain"] = {
            name: relative_error(
                value, shard(expected[name], parameters[name], name) if name in parameters else expected[name]
            )
            for name, value in step.items()
        }
    return errors


def reload_from_single_rank(folder: str) -> dict[str, float]:
    """Save a model of a single rank, load it into a tensor-parallel one: errors of its parameters."""
    build_groups(1)
    whole = tiny_model()
    dist_checkpointing.save(whole.sharded_state_dict(), folder)
    build_groups(2)
    model = tiny_model(tiny_config(tensor_model_parallel_size=2))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    weights = dict(whole.named_parameters())
    return {
        name: relative_error(parameter.detach(), shard(weights[name].detach(), parameter, name))
        for name, parameter in model.named_parameters()
    }


def initial_differences() -> dict[str, float]:
    """How much the two ranks' initial values of the replicated parameters differ."""
    build_groups(2)
    differences = {}
    for name, parameter in initial_model(tiny_config(tensor_model_parallel_size=2)).named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            others = [torch.empty_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(others, parameter.detach())
            differences[name] = float((others[0] - others[1]).abs().max())
    return differences


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (phase, settings) in CASES.items():
        documents = packed_documents([13, 17]) if "packed" in name else None
        results[name] = compare(phase, settings, documents)
    results["reloaded"] = reload_from_single_rank(sys.argv[2])
    results["initial differences"] = initial_differences()
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # saving a checkpoint starts processes that import this module again
    main()
