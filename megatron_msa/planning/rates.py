"""Rates that plans are computed from: what was measured on one H200, and named assumptions for the rest."""

from __future__ import annotations

import bisect
import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_msa.errors import ConfigError
from megatron_msa.planning.cluster import Gpu
from megatron_msa.training.flops import causal_pairs, sparse_pairs

HEADS, GROUPS, HEAD_DIM = 64, 4, 128
"""Of the benchmarks in kernels/benchmarks."""


@dataclass(frozen=True)
class Assumptions:
    """What nobody has measured here. Efficiencies are shares of the rate of large matrix products."""

    expert_efficiency: float = 0.6
    """Grouped matrix products of the experts."""
    output_efficiency: float = 0.8
    """Output projection, with the loss."""
    memory_efficiency: float = 0.7
    """Share of the data sheet's memory rate that elementwise kernels and the optimizer reach."""
    node_gb_per_s: float = 218.0
    """Measured between two H200 of one node; taken for groups of eight, too."""
    network_gb_per_s: float = 30.0
    """Per GPU: a card of 50 GB/s at 60 %."""
    reserved_gib: float = 5.0
    """CUDA, NCCL and Triton beside PyTorch's allocator, and its fragmentation."""
    host_speed: float = 1.0
    """Of one core, relative to the host of the measurements."""


@dataclass(frozen=True)
class Curve:
    """A measured quantity against the number of tokens; between points linear in the logarithms."""

    tokens: Sequence[float]
    values: Sequence[float]

    def at(self, tokens: float) -> float:
        """Interpolated; beyond the ends the nearest value."""
        if tokens <= self.tokens[0]:
            return self.values[0]
        if tokens >= self.tokens[-1]:
            return self.values[-1]
        i = bisect.bisect_right(self.tokens, tokens)
        low, high = self.tokens[i - 1], self.tokens[i]
        share = math.log(tokens / low) / math.log(high / low)
        return self.values[i - 1] * (self.values[i] / self.values[i - 1]) ** share


@dataclass(frozen=True, kw_only=True)
class HostTime:
    """Seconds that the host needs to launch layers of Transformer Engine, however little there is to compute.

    Per microbatch, but for the last two.

    Attributes:
        moe_forward, moe_backward: an expert layer with its attention, but for
        expert_forward, expert_backward: each of its experts on the rank.
        dense_forward, dense_backward: a layer without experts.
        ends: embedding, output, loss.
        buckets: per layer and step: launching the reduction of gradients, and their check, for which the host
            waits; launching the gathering of parameters.
        optimizer: per layer and step.
    """

    moe_forward: float
    moe_backward: float
    expert_forward: float
    expert_backward: float
    dense_forward: float
    dense_backward: float
    ends: float
    buckets: float
    optimizer: float

    def layer(self, experts: int, recompute: str) -> float:
        """Of one layer and microbatch.

        Args:
            experts: of a rank; 0: the layer has none.
            recompute: one of `RECOMPUTE`.
        """
        if not experts:
            return self.dense_forward * (2 if recompute == "full" else 1) + self.dense_backward
        products = experts * self.expert_forward
        forward = self.moe_forward + products
        again = {"none": 0.0, "moe": max(0.0, forward - self.dense_forward), "full": forward}[recompute]
        return forward + again + self.moe_backward + experts * self.expert_backward


@dataclass(frozen=True)
class KernelRates:
    """Measured rates.

    Attributes:
        gpu: the GPU that the plan is for. Matrix products and attention are taken to run there at the
            measured rate times the ratio of the peaks, elementwise kernels times that of the memory rates.
        matmul_tflops: of large matrix products.
        training_tflops: selection, sparse attention and KL, forward and backward, useful FLOPs; against the
            tokens of a sequence.
        forward_tflops: selection and sparse attention without KL.
        warmup_tflops: full attention with the KL over all tokens, forward and backward.
        dense_tflops: the best dense attention, forward and backward.
        select_tflops: of the selection alone.
        workspace_gib: of the training step, for 64 heads of 128.
        attention_other_us: microseconds per token of an attention layer beside kernels and matrix products,
            for a width of 64 heads of 128.
        local_layer_s: seconds that a `local` expert layer takes at least, forward and backward, however
            little there is to compute: the host launches its kernels, an expert at a time.
        host: what layers of Transformer Engine take of the host.
        assumptions: the rest.
    """

    gpu: Gpu
    matmul_tflops: float
    training_tflops: Curve
    forward_tflops: Curve
    warmup_tflops: float
    dense_tflops: Curve
    select_tflops: float
    workspace_gib: Curve
    attention_other_us: float
    local_layer_s: float
    host: HostTime
    assumptions: Assumptions

    def sparse_seconds(self, tokens: float, flops: float, select_flops: float) -> float:
        """Selection, sparse attention and KL of one sequence, forward and backward.

        Args:
            tokens: of the sequence.
            flops: useful ones, of which
            select_flops: are the index scores.
        """
        longest = self.training_tflops.tokens[-1]
        if tokens <= longest:
            return flops / (self.training_tflops.at(tokens) * 1e12)
        # Beyond the measurements only the index scores grow faster than the tokens: their rate is their own.
        at_longest = flops_at_same_width(flops, select_flops, tokens, longest)
        select_longest = select_flops * (longest / tokens) ** 2
        rest = at_longest / (self.training_tflops.values[-1] * 1e12) - select_longest / (
            self.select_tflops * 1e12
        )
        return rest * tokens / longest + select_flops / (self.select_tflops * 1e12)

    def workspace_bytes(self, tokens: float, *, heads: int) -> float:
        """Of the MSA kernels for that many query tokens."""
        # Partial results are made in chunks of a fixed budget, so more tokens hardly need more.
        return self.workspace_gib.at(tokens) * 2**30 * min(1.0, heads / HEADS)


def flops_at_same_width(flops: float, select_flops: float, tokens: float, others: float) -> float:
    """FLOPs of a sequence of another length: index scores go with its square, the rest with its length."""
    return (flops - select_flops) * others / tokens + select_flops * (others / tokens) ** 2


@dataclass(frozen=True)
class Measurements:
    """Files of results in this repository, all of one GPU model.

    Attributes:
        rows: ``rows.csv`` of kernels/benchmarks.
        earlier_rows: the same of the kernels with which ``layer`` and the runs that plans are compared with
            were measured.
        layer: ``layer.json`` of tools/bench_context_parallel.py: a whole attention layer.
        small_model: ``metrics.jsonl`` of examples/single_gpu, whose layers are too small to fill a GPU.
        small_model_layers: its number of layers.
        host: what tools/host_trace.py makes of a trace: layers of Transformer Engine, one microbatch a step.
        host_steps: ``metrics.jsonl`` of that run, whose steps no profiler slows down but the last few.
        gpu: that they were taken on.
    """

    rows: Path
    earlier_rows: Path
    layer: Path
    small_model: Path
    small_model_layers: int
    host: Path
    host_steps: Path
    gpu: Gpu

    def with_earlier_kernels(self) -> Measurements:
        """To predict what was measured then."""
        return replace(self, rows=self.earlier_rows)


WARM_STEPS = (31, 56)
"""Of the runs of 60 steps: the first dozens are slower, the last ones are profiled."""


def load_rates(files: Measurements, gpu: Gpu, assumptions: Assumptions | None = None) -> KernelRates:
    """Read the measurements.

    Args:
        files: where they are.
        gpu: that the plan is for.
        assumptions: instead of the ones named here.

    Raises:
        ConfigError: a row is missing.
    """
    assumptions = assumptions or Assumptions()
    rows, earlier = _read(files.rows), _read(files.earlier_rows)
    compute = gpu.peak_tflops / files.gpu.peak_tflops
    matmul = float(rows[0]["matmul_tflops"])
    training = _curve(rows, "train", "tflops")
    layer = json.loads(files.layer.read_text())
    # The kernels of then are what is left out of the layer of then.
    other = _attention_other_us(layer, _curve(earlier, "train", "tflops"), float(earlier[0]["matmul_tflops"]))
    return KernelRates(
        gpu=gpu,
        matmul_tflops=matmul * compute,
        training_tflops=_scaled(training, compute),
        forward_tflops=_scaled(_curve(rows, "prefill", "tflops"), compute),
        warmup_tflops=_ours(rows, "warmup")[0]["tflops"] * compute,
        dense_tflops=_scaled(_dense(rows), compute),
        select_tflops=_ours(rows, "select")[0]["tflops"] * compute,
        workspace_gib=_curve(rows, "train", "extra_gib"),
        attention_other_us=other * files.gpu.memory_tb_per_s / gpu.memory_tb_per_s,
        local_layer_s=median_step(files.small_model) / files.small_model_layers / assumptions.host_speed,
        host=_host_time(files, assumptions.host_speed),
        assumptions=assumptions,
    )


def _read(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def _ours(rows: list[dict[str, str]], op: str) -> list[dict[str, Any]]:
    """Our rows of an operation by tokens, of one document, with independent index vectors."""
    found = {}
    for row in rows:
        if row["op"] == op and row["is_ours"] == "1" and row["pattern"] in ("index", ""):
            found[int(row["queries"])] = {"tokens": int(row["queries"])} | {
                name: float(row[name] or "nan") for name in ("ms", "tflop", "tflops", "extra_gib")
            }
    if not found:
        raise ConfigError(f"the benchmark rows hold no measurement of {op!r}; run kernels/benchmarks/run.py")
    return [found[tokens] for tokens in sorted(found)]


def _curve(rows: list[dict[str, str]], op: str, name: str) -> Curve:
    points = _ours(rows, op)
    return Curve([point["tokens"] for point in points], [point[name] for point in points])


def _dense(rows: list[dict[str, str]]) -> Curve:
    best: dict[int, float] = {}
    for row in rows:
        # A baseline whose result was wrong, or that could not run, has a row without figures.
        if row["op"] == "train" and row["is_ours"] == "0" and row["tflops"]:
            tokens = int(row["queries"])
            best[tokens] = max(best.get(tokens, 0.0), float(row["tflops"]))
    return Curve(sorted(best), [best[tokens] for tokens in sorted(best)])


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(curve.tokens, [value * factor for value in curve.values])


def median_step(metrics: Path, first: int = 1, last: int | None = None) -> float:
    """Seconds of a step in the sparse phase, from the first to the last iteration asked for."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(
        row["seconds"]
        for row in rows
        if row["event"] == "step"
        and row["phase"] == "sparse"
        and first <= row["iteration"] <= (last or row["iteration"])
    )


def _host_time(files: Measurements, speed: float) -> HostTime:
    """The parts of a profiled step, as much shorter as steps without the profiler are."""
    traced = json.loads(files.host.read_text())
    seconds = median_step(files.host_steps, *WARM_STEPS) / traced["total"] / speed
    each = {name: traced[name] * seconds for name in HostTime.__dataclass_fields__}
    for name in ("buckets", "optimizer"):
        each[name] /= traced["layers"]
    return HostTime(**each)


def _attention_other_us(layer: dict[str, Any], training: Curve, matmul_tflops: float) -> float:
    """Per token: the measured layer less the kernels and the matrix products in it."""
    shapes = layer["shapes"]
    tokens, heads, groups, d = (shapes[name] for name in ("tokens", "heads", "groups", "head_dim"))
    backbone = shapes["hidden"] * d * (2 * heads + 2 * groups)
    index = shapes["hidden"] * d * (groups + 1)
    products = (6 * backbone + 4 * index) * tokens / (matmul_tflops * 1e12)
    kernels = msa_flops(tokens, heads=heads, groups=groups, d=d, d_i=d, block=shapes["block_size"], slots=16)
    kernels /= training.at(tokens) * 1e12
    return (layer["one"]["total_ms"] / 1e3 - products - kernels) / tokens * 1e6


def msa_flops(tokens: float, *, heads: int, groups: int, d: int, d_i: int, block: int, slots: int) -> float:
    """Useful FLOPs of selection, sparse attention and KL of one sequence, forward and backward.

    As kernels/benchmarks counts: the index scores once, attention 2 + 5 products, the KL gradient 3.
    """
    causal = causal_pairs([int(tokens)])
    attended = sparse_pairs([int(tokens)], block, slots)
    return 2 * d_i * groups * causal + (7 * 2 * d * heads + 3 * 2 * d_i * groups) * attended
