"""Predictions beside what was measured, for the measurements that this repository holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_msa.config import MSATransformerConfig
from megatron_msa.phases import Phase
from megatron_msa.planning.cluster import Cluster
from megatron_msa.planning.layout import Layout
from megatron_msa.planning.memory import BF16, FP32, GIB, OptimizerSettings, gathered_key_bytes, layer_bytes
from megatron_msa.planning.plan import make_plan
from megatron_msa.planning.rates import KernelRates, median_step
from megatron_msa.planning.request import Request, read_command
from megatron_msa.planning.step_time import StepEstimate
from megatron_msa.planning.weights import Model
from megatron_msa.training.parameter_count import attention_matrix_size, index_matrix_size


@dataclass(frozen=True)
class Comparison:
    """One quantity.

    Attributes:
        calibrated: whether a rate was taken from this very measurement, so that it shows nothing.
    """

    what: str
    unit: str
    predicted: float
    measured: float
    calibrated: bool = False

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.measured - 1

    def row(self) -> str:
        """A line of a Markdown table."""
        note = "calibrated on it" if self.calibrated else f"{self.error:+.0%}"
        return (
            f"| {self.what} | {self.predicted:.3g} {self.unit} | {self.measured:.3g} {self.unit} | {note} |"
        )


def attention_layer(path: Path, cluster: Cluster, rates: KernelRates) -> list[Comparison]:
    """The attention layer of tools/bench_context_parallel.py, alone and shared by its ranks.

    Args:
        path: ``layer.json``.
    """
    measured = json.loads(path.read_text())
    shapes = measured["shapes"]
    found = []
    for name, ranks in (("one", 1), ("group", measured["ranks"])):
        seconds, gib = _attention_layer(shapes, shapes["tokens"], ranks, cluster, rates)
        what = f"attention layer, {shapes['tokens']:,} tokens, {ranks} GPU{'s' if ranks > 1 else ''}"
        total = measured[name]["total_ms"]
        found.append(Comparison(f"{what}: time", "ms", seconds * 1e3, total, calibrated=ranks == 1))
        found.append(Comparison(f"{what}: peak memory", "GiB", gib, measured[name]["peak_gib_beside_input"]))
    pack = min(measured["packs"], key=lambda each: each["documents"])
    _, gib = _attention_layer(shapes, pack["tokens"], measured["ranks"], cluster, rates)
    what = f"attention layer, pack of {pack['tokens']:,} tokens, {measured['ranks']} GPUs: peak memory"
    return [*found, Comparison(what, "GiB", gib, pack["peak_gib_beside_input"])]


def _attention_layer(
    shapes: dict[str, int], tokens: int, ranks: int, cluster: Cluster, rates: KernelRates
) -> tuple[float, float]:
    """Seconds forward and backward, and GiB beside the input; the layer has no norm before it."""
    config = MSATransformerConfig(
        num_layers=1,
        hidden_size=shapes["hidden"],
        num_attention_heads=shapes["heads"],
        num_query_groups=shapes["groups"],
        kv_channels=shapes["head_dim"],
        qk_layernorm=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        transformer_impl="local",
        msa_block_size=shapes["block_size"],
        msa_schedule="sparse@0",
    )
    model = Model(config, vocabulary=0, untied=True)
    layout = Layout(world=ranks, context=ranks, chunks=((0,),))
    estimate = StepEstimate(
        model,
        layout,
        cluster,
        rates,
        seq_length=tokens,
        phase=Phase.SPARSE,
        local_layers=False,
        optimizer=OptimizerSettings(is_distributed=False),
    )
    mine = tokens / ranks
    each = layer_bytes(model, layout, is_moe=False, is_msa=True, fp32_norms=True)
    hidden = config.hidden_size
    outside = (BF16 + FP32 + BF16) * hidden  # the residual, and the norm's input and output
    kept = (each.attention - outside + each.attention_backward + BF16 * hidden) * mine
    weights = 2 * BF16 * (attention_matrix_size(config) + index_matrix_size(config))
    workspace = rates.workspace_bytes(mine, heads=config.num_attention_heads)
    gathered = gathered_key_bytes(model, layout, tokens) if ranks > 1 else 0.0
    return estimate.attention_part(True).total, (kept + weights + workspace + gathered) / GIB


def small_model(
    request: Request, metrics: Path, peak_gib: float, cluster: Cluster, rates: KernelRates
) -> list[Comparison]:
    """The run of examples/single_gpu.

    Args:
        request: its flags.
        metrics: its ``metrics.jsonl``.
        peak_gib: its peak memory, from docs/results.md.
    """
    what = "313M model, 8,192 tokens, 1 GPU"
    return _run(what, request, metrics, peak_gib, cluster, rates, calibrated=True, steps=(1, None))


def slices(folder: Path, cluster: Cluster, rates: KernelRates) -> list[Comparison]:
    """Whole steps of models with the layers of the recipes, on one GPU.

    Args:
        folder: ``slices.json``, which maps names to ``what``, ``peak_gib``, the file of ``metrics``, perhaps
            the ``steps`` to look at (else from the fourth on: the first compile kernels) and whether rates
            are taken from them (``calibrated_step``); and for each name its flags, one a line (``.flags``).
    """
    found = []
    for name, entry in json.loads((folder / "slices.json").read_text()).items():
        request = read_command((folder / f"{name}.flags").read_text().splitlines(), 1)
        metrics = folder / entry["metrics"]
        found += _run(
            entry["what"],
            request,
            metrics,
            entry["peak_gib"],
            cluster,
            rates,
            calibrated=entry.get("calibrated_step", False),
            steps=tuple(entry.get("steps", (4, None))),
        )
    return found


def _run(
    what: str,
    request: Request,
    metrics: Path,
    peak_gib: float,
    cluster: Cluster,
    rates: KernelRates,
    *,
    calibrated: bool,
    steps: tuple[int, int | None],
) -> list[Comparison]:
    plan = make_plan(request, request.layout(), cluster, rates)
    seconds = median_step(metrics, *steps)
    return [
        Comparison(f"{what}: step", "s", plan.step.total, seconds, calibrated=calibrated),
        Comparison(f"{what}: peak memory", "GiB", plan.peak_gib, peak_gib),
    ]
