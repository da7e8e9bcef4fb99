"""Times block_select on one CUDA GPU, after checking it.

    python kernels/benchmarks/bench_block_select.py --output block_select.csv

One document, all its tokens as queries, standard normal bf16 inputs. Implementations:

    triton           the op with its Triton kernels: block ids and index_lse
    torch eager      chunks of scores, largest score per block, torch.topk; no index_lse
    triton topk      the op's top-k kernel alone, on the block scores of the whole call; with index_lse
    torch.topk       torch.topk alone on the same block scores

TFLOP/s count 2 * d_i FLOPs per causal pair and group. "of matmul" is the share of the rate of an 8192^3 bf16
matmul, measured in the same run. The L2 cache is overwritten before each timed call.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from msa_kernels import DocumentLayout, block_select
from msa_kernels.block_select.triton_run import TOPK_ROWS, TOPK_SETTINGS
from msa_kernels.block_select.triton_topk import topk_kernel
from torch import Tensor

EAGER_CHUNK_BYTES = 2**30
FIELDS = [
    *("implementation", "tokens", "groups", "dim", "block_size", "blocks", "dtype"),
    *("ms_median", "ms_p20", "ms_p80", "tflops", "share_of_matmul", "matmul_tflops", "peak_extra_gib"),
    *("gpu", "driver", "torch", "triton", "commit"),
]


def main() -> None:
    arguments = parse_arguments()
    check(arguments)
    environment = describe_environment()
    matmul_tflops = measure_matmul(arguments.repeats)
    print(f"matmul 8192^3 bf16: {matmul_tflops:.0f} TFLOP/s")
    rows = []
    for tokens in arguments.tokens:
        for row in measure(tokens, arguments):
            if row["tflops"]:
                row["share_of_matmul"] = round(row["tflops"] / matmul_tflops, 3)
            row |= {"matmul_tflops": round(matmul_tflops, 1)} | environment
            rows.append(row)
            print(
                f"{tokens:>8} {row['implementation']:<12} {row['ms_median']:>9.3f} ms  "
                f"({row['ms_p20']:.3f} .. {row['ms_p80']:.3f})  {row['tflops'] or '':>6} TFLOP/s  "
                f"{row['share_of_matmul'] or '':>6} of matmul  {row['peak_extra_gib']:.2f} GiB"
            )
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--block-size", type=int, default=128, choices=(64, 128))
    parser.add_argument("--blocks", type=int, default=16, help="blocks to select, 1 to 64")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    return parser.parse_args()


def layout_of(tokens: int) -> DocumentLayout:
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    return DocumentLayout.from_document_offsets(offsets, max_document_length=tokens, num_keys=tokens)


def check(arguments: argparse.Namespace) -> None:
    """Exits unless the kernels choose the reference's blocks where scores are integers, with many ties."""
    tokens = 6001
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    index_q = torch.randint(-1, 2, (tokens, arguments.groups, arguments.dim), **options).bfloat16()
    index_k = torch.randint(-1, 2, (tokens, arguments.dim), **options).bfloat16()
    sizes = {"block_size": arguments.block_size, "num_selected_blocks": arguments.blocks}
    found = block_select(index_q, index_k, layout_of(tokens), backend="triton", **sizes)
    expected = block_select(index_q, index_k, layout_of(tokens), backend="reference", **sizes)
    if not torch.equal(found.block_ids.sort(-1).values, expected.block_ids.sort(-1).values):
        sys.exit("block_ids differ from the reference's; nothing is timed")
    if not torch.allclose(found.index_lse, expected.index_lse, rtol=1e-6, atol=1e-5):
        sys.exit("index_lse differs from the reference's; nothing is timed")


def measure(tokens: int, arguments: argparse.Namespace) -> list[dict]:
    groups, dim, block_size, blocks = arguments.groups, arguments.dim, arguments.block_size, arguments.blocks
    generator = torch.Generator("cuda").manual_seed(tokens)
    normal = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    index_q = torch.randn(tokens, groups, dim, **normal)
    index_k = torch.randn(tokens, dim, **normal)
    layout = layout_of(tokens)
    sizes = {"block_size": block_size, "num_selected_blocks": blocks}
    flops = 2 * dim * groups * tokens * (tokens + 1) / 2

    block_scores = torch.cat(list(eager_block_scores(index_q, index_k, block_size)))  # [tokens, groups, N]
    num_blocks = block_scores.shape[-1]
    rows = tokens * groups
    transposed = block_scores.view(rows, num_blocks).t().contiguous()
    block_ids = torch.empty(tokens, groups, blocks, dtype=torch.int32, device="cuda")
    index_lse = torch.empty(tokens, groups, device="cuda")

    def topk_alone() -> None:
        topk_kernel[(triton.cdiv(rows, TOPK_ROWS),)](
            transposed,
            transposed,
            layout.query_position,
            block_ids,
            index_lse,
            0,
            rows,
            rows,
            GROUPS=groups,
            BLOCK=block_size,
            COUNT=blocks,
            SLOTS=triton.next_power_of_2(blocks),
            **TOPK_SETTINGS,
        )

    def eager() -> None:
        for scores in eager_block_scores(index_q, index_k, block_size):
            scores.topk(min(blocks, num_blocks), dim=-1)

    implementations: dict[str, tuple[Callable[[], object], bool]] = {
        "triton": (lambda: block_select(index_q, index_k, layout, backend="triton", **sizes), True),
        "torch eager": (eager, True),
        "triton topk": (topk_alone, False),
        "torch.topk": (lambda: block_scores.topk(min(blocks, num_blocks), dim=-1), False),
    }
    results = []
    for name, (call, counts_scores) in implementations.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - before
        times = time_calls(call, 3 if name == "torch eager" else arguments.repeats)
        median = statistics.median(times)
        results.append(
            {
                "implementation": name,
                "tokens": tokens,
                "groups": groups,
                "dim": dim,
                "block_size": block_size,
                "blocks": blocks,
                "dtype": "bfloat16",
                "ms_median": round(median, 4),
                "ms_p20": round(quantile(times, 0.2), 4),
                "ms_p80": round(quantile(times, 0.8), 4),
                "tflops": round(flops / median / 1e9, 1) if counts_scores else None,
                "share_of_matmul": None,
                "peak_extra_gib": round(extra / 2**30, 3),
            }
        )
    return results


def eager_block_scores(index_q: Tensor, index_k: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yields fp32 [chunk, groups, N]: the largest visible score of each block, the local block as +inf."""
    tokens = index_k.shape[0]
    chunk = max(1, EAGER_CHUNK_BYTES // (index_q.shape[1] * tokens * 4))
    key = torch.arange(tokens, device="cuda")
    block = torch.arange(-(-tokens // block_size), device="cuda")
    for start in range(0, tokens, chunk):
        query = torch.arange(start, min(start + chunk, tokens), device="cuda")
        scores = torch.einsum("qrd,kd->qrk", index_q[query[0] : query[-1] + 1], index_k)
        scores = scores.masked_fill((key > query[:, None])[:, None], -torch.inf)
        padding = len(block) * block_size - tokens
        scores = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf)
        pooled = scores.unflatten(-1, (len(block), block_size)).amax(-1).float()
        yield pooled.masked_fill((block == (query // block_size)[:, None])[:, None], torch.inf)


def time_calls(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call, between CUDA events, with a cold L2 cache."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    call()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def measure_matmul(repeats: int) -> float:
    left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    times = time_calls(lambda: left @ right, max(repeats, 5))
    return 2 * 8192**3 / statistics.median(times) / 1e9


def describe_environment() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
    }


def output_of(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.split("\n")[0].strip()


if __name__ == "__main__":
    main()
