"""Two processes: a training step of a multimodal model in several layouts against a single rank's.

    torchrun --nproc-per-node 2 tests/vision/layouts_program.py RESULT.json [CASE ...]

Two microbatches: packed documents with images and a video, and plain text or other images. Gradients are
reduced while the backward pass runs (--overlap-grad-reduce). Rank 0 writes, for each case, the largest error
of each quantity relative to its largest entry.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_msa.attention.context_parallel import batch_layout  # noqa: E402
from megatron_msa.attention.packing import attached_token_layout  # noqa: E402
from megatron_msa.model.vision.encoder import VisionModel  # noqa: E402
from megatron_msa.model.vision.inputs import VisualInput, without_visual_targets  # noqa: E402
from tests.attention.tiny import initial_model, packed_documents, tiny_config  # noqa: E402
from tests.vision.tiny import interleaved, random_visuals, tiny_vision  # noqa: E402

LENGTH = 32
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}


Grids = list[list[tuple[int, int, int]]]
"""Of the visuals of two documents or sequences."""
FIRST: Grids = [[(1, 2, 4), (3, 4, 2)], [(1, 4, 4)]]
SECOND: Grids = [[(1, 2, 2)], [(1, 2, 2), (1, 2, 8)]]
TEXT: Grids = [[], []]
ONE_IMAGE: Grids = [[], [(1, 4, 4)]]


class Case(NamedTuple):
    """Sizes of the process groups, settings of the model, and what the second microbatch holds."""

    sizes: dict[str, int]
    settings: dict[str, Any]
    packed: bool = True
    second: Grids = SECOND


CASES = {
    "TP2": Case({"tensor": 2}, {"tensor_model_parallel_size": 2}),
    "TP2+SP": Case({"tensor": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True} | EXPERTS),
    "TP2+SP, a batch of text": Case(
        {"tensor": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, packed=False, second=TEXT
    ),
    "PP2": Case({"pipeline": 2}, PP2 | EXPERTS),
    "PP2, the encoder alone": Case({"pipeline": 2}, PP2 | {"pipeline_model_parallel_layout": "E|ttL"}),
    "CP2": Case({"context": 2}, {"context_parallel_size": 2} | EXPERTS),
    "CP2, zigzag": Case({"context": 2}, {"context_parallel_size": 2, "msa_cp_layout": "zigzag"}),
    "CP2, two sequences": Case({"context": 2}, {"context_parallel_size": 2}, packed=False),
    "CP2, one image": Case({"context": 2}, {"context_parallel_size": 2}, second=ONE_IMAGE),
    "CP2, full recomputation": Case({"context": 2}, {"context_parallel_size": 2} | RECOMPUTE, second=TEXT),
    "EP2": Case({"expert": 2}, {"expert_model_parallel_size": 2} | EXPERTS),
    "DP2, one rank has text": Case({}, {}, second=TEXT),
}


class Microbatch(NamedTuple):
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: PackedSeqParams | None
    visuals: VisualInput | None


def build_groups(tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
    )
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)


def microbatches(*, packed: bool, second: Grids) -> list[Microbatch]:
    """Two, equal on all ranks; document ends lie inside blocks and ranks."""
    torch.manual_seed(11)
    result = []
    for own in (FIRST, second):
        half = LENGTH // 2 if packed else LENGTH
        rows = []
        for visuals in own:
            room = half - sum(t * h * w // 4 for t, h, w in visuals)
            words = [3] * len(visuals) if visuals else []
            rows.append(interleaved(visuals, [*words, room - sum(words)]))
        tokens = torch.cat(rows, dim=1 if packed else 0)
        labels = tokens.roll(-1, dims=1)
        mask = without_visual_targets(torch.ones(labels.shape), labels, tiny_vision().placeholder_ids)
        mask[:, -1] = 0
        grids = [grid for visuals in own for grid in visuals]
        result.append(
            Microbatch(
                tokens,
                labels,
                mask,
                packed_documents([half - 1, half + 1]) if packed else None,
                random_visuals(grids, dtype=torch.float32) if grids else None,
            )
        )
    return result


def on_this_rank(batch: Microbatch, setting: str) -> Microbatch:
    """Its tokens under context parallelism."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return batch
    if batch.documents is not None:
        layout = attached_token_layout(batch.documents, setting, samples=1, size=size, rank=rank)
    else:
        layout = batch_layout(
            setting, batch=1, length=LENGTH, size=size, rank=rank, device=batch.tokens.device
        )
    cut = (values.index_select(1, layout.local) for values in batch[:3])
    return Microbatch(*cut, batch.documents, batch.visuals)


def train_step(model: Any, batches: list[Microbatch], setting: str) -> dict[str, Tensor]:
    """Sum of the losses, number of tokens, and all gradients of one step of Megatron's schedule."""
    config = model.config
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=True), model)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    sums = torch.zeros(2, dtype=torch.float64)

    def forward_step(iterator: Iterator[Microbatch], wrapped_model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = on_this_rank(next(iterator), setting)
        losses = wrapped_model(
            batch.tokens,
            torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens),
            None,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.documents,
            visual_input=batch.visuals,
        )

        def reduce(output: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss, number = (output.float() * batch.loss_mask).sum(), batch.loss_mask.sum().int()
            sums.add_(torch.stack([loss.detach().double(), number.double()]))
            return loss, number, {}

        return losses, reduce

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=False,
    )
    # Tensor-parallel ranks each have the whole loss, pipeline stages but the last have none.
    torch.distributed.all_reduce(sums)
    sums /= parallel_state.get_tensor_model_parallel_world_size()
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": sums[:1], "tokens": sums[1:], **gradients}


def global_name(name: str, first_layer: int) -> str:
    """The name in the model of a single rank of a parameter of this rank, whose layers start there."""
    if name.startswith("decoder.layers."):
        name = re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first_layer}", name)
    offset = 4 // parallel_state.get_expert_model_parallel_world_size()
    offset *= parallel_state.get_expert_model_parallel_rank()
    return re.sub(r"local_experts\.(\d+)", lambda match: f"local_experts.{int(match[1]) + offset}", name)


def shard(full: Tensor, parameter: Tensor, name: str) -> Tensor:
    """This rank's part of a tensor of the whole model."""
    size, axis = parallel_state.get_tensor_model_parallel_world_size(), -1
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    rank, axis = parallel_state.get_tensor_model_parallel_rank(), parameter.partition_dim
    if "linear_fc1" in name and not name.startswith("vision_model."):  # gate and up projection
        return torch.cat([half.chunk(size, axis)[rank] for half in full.chunk(2, axis)], axis)
    return full.chunk(size, axis)[rank]


def relative_error(actual: Tensor, expected: Tensor, largest: Tensor) -> float:
    """Relative to the largest entry of the whole tensor; a zero must be met."""
    scale = largest.abs().max()
    return float((actual - expected).abs().max() / scale) if scale else float(actual.abs().max())


def build(case: Case) -> Any:
    settings = {"calculate_per_token_loss": True, "init_method_std": 0.2}
    return initial_model(
        tiny_config(**{**settings, **case.settings}),
        vision=tiny_vision(),
        parallel_output=True,
    ).train()


def compare(case: Case) -> dict[str, float]:
    batches = microbatches(packed=case.packed, second=case.second)
    build_groups()
    single = {name for name in case.settings if "_parallel" not in name and not name.startswith("pipeline_")}
    whole = build(case._replace(settings={name: case.settings[name] for name in single}))
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    # A single rank: this process computes both microbatches, and the mean over both processes is the same.
    expected = train_step(whole, batches, "auto")
    expected["loss"], expected["tokens"] = expected["loss"] / 2, expected["tokens"] / 2

    build_groups(**case.sizes)
    model = build(case)
    parameters = dict(model.named_parameters())
    first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    names = {name: global_name(name, first_layer) for name in parameters}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard(weights[names[name]], parameter, name))
    encoded: list[int] = []
    for module in model.modules():
        if isinstance(module, VisionModel):
            # An idle rank encodes blank patches, which are not counted.
            module.register_forward_pre_hook(
                lambda _, inputs: encoded.append(int(inputs[0].any(dim=1).sum()))
            )
    batches = microbatches(packed=case.packed, second=case.second)  # layouts are kept with the documents
    replicas = parallel_state.get_data_parallel_world_size()
    own = batches[parallel_state.get_data_parallel_rank() :: replicas]
    actual = train_step(model, own, case.settings.get("msa_cp_layout", "auto"))
    errors: dict[str, float] = {"patches encoded": float(sum(encoded))}
    for name, value in actual.items():
        if name in parameters:
            whole_gradient = expected[names[name]]
            part = shard(whole_gradient, parameters[name], name)
            errors[names[name]] = relative_error(value, part, whole_gradient)
        else:
            errors[name] = relative_error(value, expected[name], expected[name])
    return errors


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {}
    for name, case in CASES.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        mine = compare(case)
        everyones: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyones, mine)
        names = sorted(everyones[0].keys() | everyones[1].keys())
        results[name] = {each: [errors.get(each) for errors in everyones] for each in names}
        if torch.distributed.get_rank() == 0:
            errors = [
                (error, each)
                for each, pair in results[name].items()
                for error in pair
                if error is not None and each != "patches encoded"
            ]
            # NaN first: it compares with nothing.
            worst = max(errors, key=lambda found: (math.isnan(found[0]), found[0]))
            print(name, worst, results[name]["patches encoded"], flush=True)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
