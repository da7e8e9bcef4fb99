"""The tables of docs/context_parallelism.md: balance of real packs, and how far context parallelism scales.

    python tools/context_parallel_tables.py --results docs/results/context_parallel/h200_x2.json

The first is counted from the lengths of published packs. The second is computed from the times that
tools/bench_context_parallel.py measured and from the assumptions named below.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

import torch  # noqa: E402

from megatron_msa.attention.context_parallel import packed_layout  # noqa: E402

PACKS = REPOSITORY / "kernels/benchmarks/workloads/cp16_192k.json"

# Assumptions of the second table.
NODE_SIZE = 8
NETWORK_GB_PER_S = 240.0
"""Into a node, over all of its network cards: eight of 50 GB/s at 60 %."""
PROJECTION_TFLOPS = 600.0
"""Per GPU, of the output projection's backward pass, beside which the keys are gathered again."""
OTHER_TFLOPS = 400.0
"""Per GPU, of everything outside the attention layers."""
# The 109B model of arXiv 2606.13392, with expert FFNs of 2304 (not given there).
LAYERS = 41
ACTIVE_OUTSIDE_ATTENTION = 3 * (3 * 3072 * 12288) + 38 * (5 * 3 * 3072 * 2304 + 3072 * 128) + 3072 * 200_000
"""Weights that a token meets, without embedding and attention; FFN of the three dense layers: 12288."""


def balance(path: Path) -> list[str]:
    """Largest over mean work of the ranks, per pack and layout; last, weighted by how often a pack occurs."""
    data = json.loads(path.read_text())
    block, slots, size = data["msa"]["block_size"], data["msa"]["topk"], data["cp_size"]
    rows = [
        "| documents | longest | zigzag: all pairs / selected pairs | balanced: all pairs / selected pairs |",
        "|---|---|---|---|",
    ]
    weighted = torch.zeros(2, 2, dtype=torch.float64)
    weights = 0
    for case in data["cases"]:
        offsets = case["global_cu_seqlens"]
        lengths = [end - start for start, end in pairwise(offsets)]
        position = torch.cat([torch.arange(length) for length in lengths])
        attended = torch.where(
            position // block < slots, position + 1, (slots - 1) * block + position % block + 1
        )
        found = []
        for layout in ("zigzag", "balanced"):
            owned = packed_layout(
                layout, offsets, samples=1, size=size, rank=0, device=torch.device("cpu")
            ).owned
            work = torch.stack([(position + 1)[owned].sum(1), attended[owned].sum(1)]).double()
            found.append(work.amax(dim=1) / work.mean(dim=1))
        weighted += case["representative_weight"] * torch.stack(found)
        weights += case["representative_weight"]
        rows.append(f"| {len(lengths)} | {max(lengths):,} | {_pair(found[0])} | {_pair(found[1])} |")
    mean = weighted / weights
    return [*rows, f"| weighted mean | | {_pair(mean[0])} | {_pair(mean[1])} |"]


def _pair(values: torch.Tensor) -> str:
    return f"{float(values[0]):.3f} / {float(values[1]):.3f}"


@dataclass(frozen=True)
class Layer:
    """One attention layer on ``gpus`` context-parallel ranks; times in ms, forward and backward."""

    compute: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def layer(measured: dict[str, Any], tokens: int, gpus: int) -> Layer:
    """From the times of one GPU: the selection grows with the square of the tokens, all else linearly."""
    shapes, one = measured["shapes"], measured["one"]
    scale = tokens / shapes["tokens"]
    select = one["device_ms"]["block_select"] * scale**2 / gpus
    linear = (one["total_ms"] - one["device_ms"]["block_select"]) * scale / gpus
    if gpus == 1:
        return Layer(select + linear, 0.0)
    row = 2 * (2 * shapes["groups"] * shapes["head_dim"])  # bytes of K and V of a token, bf16
    index_row = 2 * shapes["head_dim"]
    keys, index = (_gather_ms(measured, tokens * each, gpus) for each in (row, index_row))
    back = _gather_ms(measured, tokens * 2 * (row + index_row), gpus)  # gradients are summed in fp32
    projection = 4 * shapes["heads"] * shapes["head_dim"] * shapes["hidden"] * tokens / gpus
    projection_ms = projection / (PROJECTION_TFLOPS * 1e9)
    # Index keys and gradients are taken to be exposed, though the rotary embedding of the queries is beside.
    exposed = index + max(0.0, keys - select) + max(0.0, keys + index - projection_ms) + back
    return Layer(select + linear, exposed)


def _gather_ms(measured: dict[str, Any], total_bytes: float, gpus: int) -> float:
    """An all-gather to, or a reduce-scatter of, that many bytes on every rank."""
    alone = measured["alone"]
    inside = 2 * alone["elements"] * (1 - 1 / measured["ranks"]) / alone["all_gather_ms"]  # bytes per ms
    moved = total_bytes * (1 - 1 / gpus)
    nodes = -(-gpus // NODE_SIZE)
    across = total_bytes * (1 - 1 / nodes) / (NETWORK_GB_PER_S * 1e6)
    return max(moved / inside, across)


def scaling(measured: dict[str, Any]) -> list[str]:
    """Per sequence length and number of GPUs that share one sequence."""
    rows = [
        "| tokens | GPUs | tokens per GPU | layer: compute / exposed communication, ms | efficiency | "
        "109B model: tokens/s per GPU |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in (2**17, 2**18, 2**19, 2**20):
        alone = layer(measured, tokens, 1).total
        for gpus in (8, 16, 32, 64, 128, 256, 512):
            if tokens // gpus < 1024:
                continue
            here = layer(measured, tokens, gpus)
            outside = 6 * ACTIVE_OUTSIDE_ATTENTION * tokens / gpus / (OTHER_TFLOPS * 1e9)
            per_second = tokens / gpus / (LAYERS * here.total + outside) * 1e3
            rows.append(
                f"| {tokens:,} | {gpus} | {tokens // gpus:,} | {here.compute:.1f} / {here.exposed:.1f} | "
                f"{alone / gpus / here.total:.0%} | {per_second:,.0f} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="written by bench_context_parallel.py")
    parser.add_argument("--packs", type=Path, default=PACKS)
    options = parser.parse_args()
    print("\n".join(balance(options.packs)), end="\n\n")
    print("\n".join(scaling(json.loads(options.results.read_text()))))


if __name__ == "__main__":
    main()
