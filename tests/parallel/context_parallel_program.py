"""Several processes: one step of a model with and without context parallelism, from the same weights.

    torchrun --nproc-per-node 2 tests/parallel/context_parallel_program.py RESULT.json

Rank 0 writes, for each case, the largest error of each quantity relative to its largest entry.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a program, not by pytest

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_msa.attention import self_attention  # noqa: E402
from megatron_msa.attention.context_parallel import batch_layout, packed_layout  # noqa: E402
from megatron_msa.phases import Phase  # noqa: E402
from tests.attention.tensor_parallel_program import relative_error, shard  # noqa: E402
from tests.attention.tiny import (  # noqa: E402
    VOCABULARY,
    kl_of,
    packed_documents,
    set_phase,
    tiny_config,
    tiny_model,
)
from tests.parallel.exchange_checks import exchange_claims  # noqa: E402

SEQUENCE = 48
DOCUMENTS = [13, 30, 1, 20, 32]
"""96 tokens; boundaries inside blocks (of 4 tokens), chunks (of 6 to 24 tokens) and ranks."""
DIVISIBLE = [16, 40, 8, 32]
"""96 tokens that every rank of up to four can share document by document."""
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
PER_TOKEN = {"calculate_per_token_loss": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    """``documents`` None: a plain batch of two sequences."""

    phase: Phase
    layout: str = "zigzag"
    documents: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1

    @property
    def parallel(self) -> dict[str, Any]:
        tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
        size = torch.distributed.get_world_size() // self.tensor_parallel
        return {"context_parallel_size": size, **(tensor if self.tensor_parallel > 1 else {})}

    @property
    def group_sizes(self) -> dict[str, int]:
        return {name: size for name, size in self.parallel.items() if name.endswith("_size")}


def cases(processes: int) -> dict[str, Case]:
    packed = {"documents": DOCUMENTS}
    found = {}
    for phase in (Phase.DENSE, Phase.WARMUP, Phase.SPARSE):
        for layout in ("zigzag", "balanced"):
            found[f"{phase.value}, plain, {layout}"] = Case(phase, layout)
            found[f"{phase.value}, packed, {layout}"] = Case(phase, layout, **packed)
    if processes > 2:
        for case in (
            Case(Phase.DENSE, tensor_parallel=2),
            Case(Phase.WARMUP, "balanced", **packed, tensor_parallel=2),
            Case(Phase.SPARSE, **packed, tensor_parallel=2),
        ):
            found[f"{case.phase.value}, {case.layout}, TP2 x CP2"] = case
        return found
    full_layer = {"msa_layer_freq": "[0,1]"}
    return found | {
        "sparse, each document cut": Case(Phase.SPARSE, "documents", DIVISIBLE),
        "sparse, per-token loss": Case(
            Phase.SPARSE, "balanced", **packed, settings={"calculate_per_token_loss": True}
        ),
        "sparse, selective recomputation": Case(Phase.SPARSE, "balanced", **packed, settings=SELECTIVE),
        "warmup, selective recomputation": Case(Phase.WARMUP, settings=SELECTIVE),
        "sparse, full recomputation": Case(Phase.SPARSE, "balanced", **packed, settings=FULL),
        "sparse, full attention below": Case(Phase.SPARSE, "balanced", **packed, settings=full_layer),
        "sparse, full attention below, plain": Case(Phase.SPARSE, settings=full_layer | SELECTIVE),
        "sparse, gated": Case(Phase.SPARSE, "balanced", **packed, settings={"attention_output_gate": True}),
    }


def build_groups(**sizes: int) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)


def tokens_of_this_rank(case: Case) -> Tensor:
    """Places in the microbatch, batch-major."""
    size = parallel_state.get_context_parallel_world_size()
    cut = {"size": size, "rank": parallel_state.get_context_parallel_rank(), "device": torch.device("cpu")}
    if case.documents is None:
        return batch_layout(case.layout, batch=2, length=SEQUENCE, **cut).local
    offsets = [0, *torch.tensor(case.documents).cumsum(0).tolist()]
    return packed_layout(case.layout, offsets, samples=1, **cut).local


def train_step(model: GPTModel, case: Case, mine: Tensor | None) -> dict[str, Any]:
    """Losses, KL sums per layer, block ids and gradients of one step of Megatron's schedule.

    Args:
        mine: the tokens of this rank, None for all.
    """
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    torch.manual_seed(11)
    shape = (2, SEQUENCE) if case.documents is None else (1, sum(case.documents))
    tokens, labels = torch.randint(VOCABULARY, (2, *shape))
    if mine is not None:
        tokens, labels = (x.reshape(-1)[mine].view(shape[0], -1) for x in (tokens, labels))
    documents = None if case.documents is None else packed_documents(case.documents)
    losses, block_ids = [], []

    def forward_step(batches: Iterator[None], wrapped_model: torch.nn.Module) -> tuple[Tensor, Any]:
        logits = wrapped_model(tokens, tokens, None, packed_seq_params=documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses.append(loss.detach())
        return loss, lambda output: (output.sum(), torch.tensor(output.numel(), dtype=torch.int), {})

    def recorded(*args: Any, **kwargs: Any) -> Any:
        selection = block_select(*args, **kwargs)
        block_ids.append(selection.block_ids)
        return selection

    block_select, self_attention.block_select = self_attention.block_select, recorded
    try:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([None]),
            model=wrapped,
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=shape[0],
            forward_only=False,
        )
    finally:
        self_attention.block_select = block_select
    kl = [torch.zeros(2, dtype=torch.float64) if sums is None else sums.clone() for sums in kl_of(model)]
    for sums in kl:
        torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
        torch.distributed.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    found = {"losses": losses[0], "kl": torch.stack(kl), **gradients}
    if block_ids:
        found["block_ids"] = torch.stack(block_ids)
    return found


def on_a_single_rank(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and what `train_step` finds."""
    torch.manual_seed(7)
    model = tiny_model(tiny_config(**case.settings))
    set_phase(model, case.phase)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, train_step(model, case, None)


def errors(case: Case, weights: dict[str, Tensor], expected: dict[str, Any]) -> dict[str, float]:
    """What differs from the single rank, in the process groups of the case."""
    mine = tokens_of_this_rank(case)
    config = tiny_config(**case.settings, **case.parallel, msa_cp_layout=case.layout)
    model = tiny_model(config, parallel_output=False)
    set_phase(model, case.phase)
    parameters = dict(model.named_parameters())
    is_sharded = case.tensor_parallel > 1
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard(weights[name], parameter, name) if is_sharded else weights[name])
    step = train_step(model, case, mine)

    expected = dict(expected)
    expected["losses"] = expected["losses"].flatten()[mine]
    if "block_ids" in expected:
        groups = expected["block_ids"].chunk(case.tensor_parallel, dim=2)
        ids = groups[parallel_state.get_tensor_model_parallel_rank()][:, mine]
        # The order of the chosen blocks is free.
        step["block_ids"], expected["block_ids"] = (
            x.sort(dim=-1).values.double() for x in (step["block_ids"], ids)
        )
    if is_sharded:
        for name, parameter in parameters.items():
            expected[name] = shard(expected[name], parameter, name)
    assert step.keys() == expected.keys()
    return {name: relative_error(value, expected[name]) for name, value in step.items()}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    build_groups()
    to_run = cases(torch.distributed.get_world_size())
    expected = {name: on_a_single_rank(case) for name, case in to_run.items()}
    for tensor_parallel in (1, 2):  # few sets of groups: each leaves threads behind
        named = {name: case for name, case in to_run.items() if case.tensor_parallel == tensor_parallel}
        if named:
            build_groups(**next(iter(named.values())).group_sizes)
            results |= {name: errors(case, *expected[name]) for name, case in named.items()}
            results["exchange"] = exchange_claims(parallel_state.get_context_parallel_group())
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
