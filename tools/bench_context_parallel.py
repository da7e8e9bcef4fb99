"""One MSA layer on all GPUs of a context-parallel group against the same layer on one of them.

    torchrun --nproc-per-node 2 tools/bench_context_parallel.py --output results.json

Measured: forward and backward time, peak memory, whether outputs and gradients agree, and, from a profiler
trace, how long the collectives take and what runs beside them. Without GPUs it runs tiny sizes over gloo, to
try the program. Results are printed as they come and written as JSON by rank 0.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_msa.training import no_gpu  # noqa: E402

HAS_GPU = not no_gpu.install_if_no_gpu()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from benchmarks import environment  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_msa.attention import self_attention  # noqa: E402
from megatron_msa.attention.context_parallel import TokenLayout, batch_layout, packed_layout  # noqa: E402
from megatron_msa.attention.layer_specs import msa_layer_specs  # noqa: E402
from megatron_msa.config import MSATransformerConfig  # noqa: E402
from tools.kernel_trace import Kernels  # noqa: E402

ANNOTATED = ("block_select", "sparse_attention")


class Bench:
    """The layer, its input and the gradient of its output, equal on every rank."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.tokens: int = options.tokens
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.tokens, 1, options.hidden)
        self.input, self.gradient = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(options.dtype)
            for _ in range(2)
        )
        self.weights: dict[str, Tensor] | None = None
        self._share({"input": self.input, "gradient": self.gradient})

    def _share(self, tensors: dict[str, Tensor]) -> None:
        """Give every rank the first one's values, and say which were others."""
        for name, tensor in tensors.items():
            before = tensor.clone()
            dist.broadcast(tensor, 0)
            if not torch.equal(before, tensor):
                print(f"rank {dist.get_rank()}: {name} differed from that of rank 0", flush=True)

    def layer(self, context_parallel: int, layout: str = "auto") -> nn.Module:
        """A fresh layer with the same weights, in groups of that size."""
        options = self.options
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(context_parallel_size=context_parallel)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = MSATransformerConfig(
            num_layers=1,
            hidden_size=options.hidden,
            num_attention_heads=options.heads,
            num_query_groups=options.groups,
            kv_channels=options.head_dim,
            ffn_hidden_size=options.hidden,
            normalization="RMSNorm",
            qk_layernorm=True,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            transformer_impl="local",
            bf16=options.dtype is torch.bfloat16,
            params_dtype=options.dtype,
            gradient_accumulation_fusion=False,
            context_parallel_size=context_parallel,
            msa_cp_layout=layout,
            msa_block_size=options.block_size,
            msa_schedule="sparse@0",
        )
        spec = msa_layer_specs(config)[0].submodules.self_attention
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = (
            build_module(spec, config=config, layer_number=1, pg_collection=groups).to(self.device).train()
        )
        if self.weights is None:
            self.weights = {name: value.detach().clone() for name, value in layer.named_parameters()}
            self._share(self.weights)
        layer.load_state_dict(self.weights, strict=False)
        rotary = RotaryEmbedding(options.head_dim, 0.5, use_cpu_initialization=not HAS_GPU)
        rotary.cp_group = None
        layer.rotary_table = rotary(self.tokens)
        return layer

    def run(
        self, layer: nn.Module, rows: Tensor | None, packed: PackedSeqParams | None = None
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Forward and backward: output, gradient of the input, milliseconds of both passes."""
        x = self.input if rows is None else self.input[rows]
        gradient = self.gradient if rows is None else self.gradient[rows]
        x = x.detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        clock = Clock()
        output, _ = layer(x, None, rotary_pos_emb=layer.rotary_table, packed_seq_params=packed)
        clock.lap()
        output.backward(gradient)
        clock.lap()
        return output.detach(), x.grad, clock.milliseconds()


class Clock:
    """Laps in milliseconds, by CUDA events where there is a GPU."""

    def __init__(self) -> None:
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        mark: Any = time.perf_counter()
        if HAS_GPU:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append(mark)

    def milliseconds(self) -> list[float]:
        pairs = list(itertools.pairwise(self._marks))
        if not HAS_GPU:
            return [(end - start) * 1e3 for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def timed(call: Callable[[], list[float]], repeats: int) -> dict[str, float]:
    """Medians over the repeats of the slowest rank's forward, backward and total milliseconds."""
    samples = []
    for repeat in range(repeats + 2):
        dist.barrier()
        forward, backward = call()
        slowest = torch.tensor([forward, backward, forward + backward], device=_device())
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= 2:
            samples.append(slowest)
    names = ("forward_ms", "backward_ms", "total_ms")
    return dict(zip(names, torch.stack(samples).median(dim=0).values.tolist(), strict=True))


@contextlib.contextmanager
def annotated() -> Iterator[dict[str, Any]]:
    """Name the ops of the layer in traces; collects the last selection."""
    found: dict[str, Any] = {}
    originals = {name: getattr(self_attention, name) for name in ANNOTATED}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(name):
                found[name] = originals[name](*args, **kwargs)
            return found[name]

        return call

    for name in ANNOTATED:
        setattr(self_attention, name, wrapped(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(self_attention, name, original)


def traced(call: Callable[[], Any]) -> Kernels:
    """The GPU kernels of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if HAS_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    dist.barrier()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        return Kernels.of_trace(json.loads(Path(file.name).read_text())["traceEvents"])


def measure(
    bench: Bench, layer: nn.Module, rows: Tensor | None, packed: PackedSeqParams | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures, and the output, gradients and selection to compare."""
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if HAS_GPU else 0
    with annotated() as found:
        times = timed(lambda: bench.run(layer, rows, packed)[2], bench.options.repeats)
        figures: dict[str, Any] = {name: round(value, 3) for name, value in times.items()}
        if HAS_GPU:
            figures["peak_gib_beside_input"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
        output, input_gradient, _ = bench.run(layer, rows, packed)
    tensors = {"output": output, "input gradient": input_gradient}
    tensors["selection"] = found["block_select"].block_ids
    return figures, tensors | {name: p.grad for name, p in layer.named_parameters()}


def row_errors(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Norm of the difference over the norm of the expected, per row: the median and the largest."""
    difference = (actual.float() - expected.float()).flatten(1).norm(dim=1)
    relative = difference / expected.float().flatten(1).norm(dim=1)
    return {"median": float(relative.median()), "largest": float(relative.max())}


def agreement(
    one: dict[str, Tensor], many: dict[str, Tensor], rows: Tensor, parameters: list[str]
) -> dict[str, Any]:
    """How far the group is from the single GPU, over the rows of this rank."""
    ids = [x.sort(dim=-1).values for x in (many["selection"], one["selection"][rows])]
    result: dict[str, Any] = {
        "rows with the same blocks": float((ids[0] == ids[1]).all(dim=-1).all(dim=-1).float().mean()),
        "output": row_errors(many["output"], one["output"][rows]),
        "gradient of the input": row_errors(many["input gradient"], one["input gradient"][rows]),
    }
    for name in parameters:
        total = many[name].float()
        dist.all_reduce(total)
        expected = one[name].float()
        result[f"gradient of {name}"] = float((total - expected).norm() / expected.norm())
    return result


def bandwidth(elements: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of the collectives alone, for one tensor of the layer's keys."""
    size = dist.get_world_size()
    local = torch.ones(elements // size, dtype=dtype, device=device)
    everything = torch.empty(elements, dtype=dtype, device=device)
    sums, part = torch.ones(elements, device=device), torch.empty(elements // size, device=device)
    calls = {
        "all_gather_ms": lambda: dist.all_gather_into_tensor(everything, local),
        "reduce_scatter_fp32_ms": lambda: dist.reduce_scatter_tensor(part, sums),
    }
    result = {}
    for name, call in calls.items():
        samples = []
        for _ in range(12):
            dist.barrier()
            clock = Clock()
            call()
            clock.lap()
            samples.append(clock.milliseconds()[0])
        result[name] = round(sorted(samples[2:])[5], 4)
    return {"elements": elements, **result}


def packs(bench: Bench, path: Path, cases: list[int]) -> list[dict[str, Any]]:
    """Real packs of documents: time under both layouts."""
    size, rank = dist.get_world_size(), dist.get_rank()
    data = json.loads(path.read_text())
    results = []
    for number in cases:
        offsets = data["cases"][number]["global_cu_seqlens"]
        for layout in ("zigzag", "balanced"):
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=bench.device)
            longest = max(b - a for a, b in itertools.pairwise(offsets))
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            rows = packed_layout(layout, offsets, samples=1, size=size, rank=rank, device=bench.device).local
            layer = bench.layer(size, layout)
            figures, _ = measure(bench, layer, rows, packed)
            results.append(
                {"case": number, "documents": len(offsets) - 1, "tokens": offsets[-1], "layout": layout}
                | figures
            )
            report(results[-1])
    return results


def report(what: Any) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(what), flush=True)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=262_144 if HAS_GPU else 256)
    parser.add_argument("--hidden", type=int, default=3072 if HAS_GPU else 32)
    parser.add_argument("--heads", type=int, default=64 if HAS_GPU else 4)
    parser.add_argument("--groups", type=int, default=4 if HAS_GPU else 2)
    parser.add_argument("--head-dim", type=int, default=128 if HAS_GPU else 8)
    parser.add_argument("--block-size", type=int, default=128 if HAS_GPU else 4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packs", type=Path, default=None, help="a file of real packs of documents")
    parser.add_argument("--pack-cases", type=int, nargs="*", default=[5, 8], help="which of them")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if HAS_GPU else torch.float32
    return options


def on_one(bench: Bench) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every rank runs the whole sequence by itself."""
    layer = bench.layer(1)
    figures, tensors = measure(bench, layer, None)
    with annotated():
        figures |= traced(lambda: bench.run(layer, None)).summary(ANNOTATED)
    return figures, tensors


def on_group(bench: Bench, single: dict[str, Tensor]) -> dict[str, Any]:
    """Figures of the group, its agreement with a single rank and its collectives."""
    size, rank = dist.get_world_size(), dist.get_rank()
    layer = bench.layer(size)
    layout: TokenLayout = batch_layout(
        "auto", batch=1, length=bench.tokens, size=size, rank=rank, device=bench.device
    )
    figures, tensors = measure(bench, layer, layout.local)
    report(figures)
    agrees = agreement(single, tensors, layout.local, [name for name, _ in layer.named_parameters()])
    report(agrees)
    del tensors
    single.clear()
    with annotated():
        kernels = traced(lambda: bench.run(layer, layout.local))
    figures |= kernels.summary(ANNOTATED)
    collectives = kernels.collectives("block_select")
    report(collectives)
    return {"group": figures, "agreement": agrees, "collectives": collectives}


def main() -> None:
    options = _arguments()
    dist.init_process_group("nccl" if HAS_GPU else "gloo")
    rank = dist.get_rank()
    if HAS_GPU:
        torch.cuda.set_device(rank)
    device = _device()
    bench = Bench(options, device)
    left_out = ("output", "packs", "dtype", "commit")
    result: dict[str, Any] = environment.describe(device, options.commit)
    result["ranks"] = dist.get_world_size()
    result["shapes"] = {name: value for name, value in vars(options).items() if name not in left_out}

    def write() -> None:
        if rank == 0:
            options.output.write_text(json.dumps(result, indent=1) + "\n")

    result["one"], single = on_one(bench)
    report(result["one"])
    write()
    result |= on_group(bench, single)
    result["speedup"] = {
        name: round(result["one"][name] / result["group"][name], 3)
        for name in ("forward_ms", "backward_ms", "total_ms")
    }
    report(result["speedup"])
    write()
    result["alone"] = bandwidth(options.tokens * options.groups * options.head_dim, options.dtype, device)
    report(result["alone"])
    if options.packs is not None:
        result["packs"] = packs(bench, options.packs, options.pack_cases)
    write()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
