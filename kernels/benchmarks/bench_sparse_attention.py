"""Times sparse attention with its KL loss against dense attention on one GPU.

    python kernels/benchmarks/bench_sparse_attention.py --tokens 16384 32768 131072 --csv sparse_attention.csv

Checks the kernels against the reference first: every output and gradient at 2,000 tokens, and rows of the
timed call itself. Then, per length, in milliseconds (CUDA events, median, 20 and 80 % quantiles, L2 flushed
before each run): forward, and forward + backward, of sparse attention over a local selection (neighbouring
queries share about 90 % of their blocks) and a random one, and of dense causal attention by cuDNN and
FlashAttention-2. A large matmul in the same run gives the ceiling. TFLOP/s count useful work only: pairs of a
query and a key that it attends to.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from msa_kernels import DocumentLayout, sparse_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, GROUPS, DIM, BLOCK, SLOTS = 64, 4, 128, 128, 16
DTYPE = torch.bfloat16
# Share of the slots that a query does not take over from its neighbour.
SELECTIONS = {"local": 0.1, "random": 1.0}
CHECK_LIMIT = 6e-3  # of norms; bf16 rounds with 2e-3 to 4e-3


def select(num_tokens: int, change: float, *, seed: int = 0) -> Tensor:
    """Block ids [tokens, groups, slots] of one document; each slot draws from a range of blocks of its own.

    From one query to the next, a slot draws again with probability ``change``. The last slot is the local
    block.
    """
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (num_tokens, GROUPS, SLOTS - 1)
    token = torch.arange(num_tokens, device="cuda")
    draws_again = torch.rand(shape, generator=generator, device="cuda") < change
    draws_again[0] = True
    last_draw = torch.where(draws_again, token[:, None, None], 0).cummax(0).values
    draw = torch.rand(shape, generator=generator, device="cuda").gather(0, last_draw)
    local = (token // BLOCK)[:, None, None]
    slot = torch.arange(SLOTS - 1, device="cuda")
    low, high = slot * local // (SLOTS - 1), (slot + 1) * local // (SLOTS - 1)
    ids = low + (draw * (high - low)).long()
    ids = torch.where(local < SLOTS - 1, torch.where(slot < local, slot, -1), ids)
    return torch.cat([ids, local.expand(-1, GROUPS, 1)], dim=-1).int()


def attended_pairs(block_ids: Tensor) -> int:
    """Pairs of a query and a key it attends to, over all groups, of one document."""
    token = torch.arange(block_ids.shape[0], device=block_ids.device)
    whole_blocks = (block_ids >= 0).sum(-1) - 1
    return int((whole_blocks * BLOCK + (token % BLOCK + 1)[:, None]).sum())


def make_inputs(num_tokens: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """q, k, v, index_q, index_k; leaves that require gradients."""
    torch.manual_seed(0)
    shapes = [(HEADS, DIM), (GROUPS, DIM), (GROUPS, DIM), (GROUPS, DIM), (DIM,)]
    return [torch.randn(num_tokens, *shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def run_sparse(leaves: list[Tensor], block_ids: Tensor, layout: DocumentLayout, backend: Any = "triton"):
    """The op with KL."""
    return sparse_attention(
        *leaves[:3],
        block_ids,
        layout,
        block_size=BLOCK,
        index_q=leaves[3],
        index_k=leaves[4],
        backend=backend,
    )


def check() -> None:
    """Compares with the reference; ends the program where they differ by more than rounding."""

    def compare(name: str, found: Tensor, expected: Tensor) -> None:
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        print(f"check {name}: relative error {error:.1e}", flush=True)
        if not error < CHECK_LIMIT:
            sys.exit(f"{name} is wrong; nothing was timed")

    tokens = 2000
    leaves, block_ids = make_inputs(tokens), select(tokens, 1.0)
    layout = DocumentLayout.dense_batch(1, tokens, device="cuda")
    upstream = [torch.randn_like(leaves[0]), torch.rand(tokens, GROUPS, device="cuda")]
    results = []
    for backend, dtype in (("triton", DTYPE), ("reference", torch.float64)):
        cast = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        output = run_sparse(cast, block_ids, layout, backend)
        gradients = torch.autograd.grad(
            [output.out, output.kl],
            cast,
            [upstream[0].to(dtype), upstream[1].to(output.kl.dtype)],
        )
        results.append([*output, *gradients])
    names = ("out", "lse", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")
    for name, found, expected in zip(names, *results, strict=True):
        compare(name, found.detach(), expected.detach())

    tokens = 16384
    leaves = [leaf.detach() for leaf in make_inputs(tokens)]
    layout = DocumentLayout.dense_batch(1, tokens, device="cuda")
    rows = torch.randperm(tokens, device="cuda")[:128]
    for selection, change in SELECTIONS.items():
        block_ids = select(tokens, change)
        found = run_sparse(leaves, block_ids, layout)
        of_rows = [leaves[0][rows], leaves[1], leaves[2], leaves[3][rows], leaves[4]]
        expected = run_sparse(of_rows, block_ids[rows], layout.select_queries(rows), "reference")
        for name in ("out", "lse", "kl"):
            compare(
                f"{name} at {tokens} tokens, {selection}", getattr(found, name)[rows], getattr(expected, name)
            )


class Timer:
    """Milliseconds of a call on the GPU."""

    def __init__(self) -> None:
        self._l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> dict[str, float]:
        """Median and quantiles over ``repeats`` runs with a cold L2, and the peak memory of a run in GiB."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = []
        for _ in range(repeats):
            self._l2.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        )
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        return dict(zip(("ms", "p20", "p80"), quantiles.tolist(), strict=True)) | {"extra_gib": extra}


def measure(num_tokens: int, timer: Timer, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per kernel and pass."""
    leaves = make_inputs(num_tokens)
    upstream = torch.randn_like(leaves[0])
    layout = DocumentLayout.dense_batch(1, num_tokens, device="cuda")
    for selection, change in SELECTIONS.items():
        block_ids = select(num_tokens, change)
        dkl = torch.full((num_tokens, GROUPS), 1 / (num_tokens * GROUPS), device="cuda")

        def forward(block_ids: Tensor = block_ids):
            return run_sparse(leaves, block_ids, layout)

        def forward_without_kl(block_ids: Tensor = block_ids):
            return sparse_attention(*leaves[:3], block_ids, layout, block_size=BLOCK, backend="triton")

        def both(forward=forward, dkl: Tensor = dkl) -> None:
            output = forward()
            torch.autograd.grad([output.out, output.kl], leaves, [upstream, dkl])

        # The scores of a pair take 2 d FLOPs a head, its share of the output as much; backward 2.5 times
        # both. The KL counts nothing here.
        flops = 4 * DIM * (HEADS // GROUPS) * attended_pairs(block_ids)
        calls = {
            "forward": (forward, 1),
            "forward, no KL": (forward_without_kl, 1),
            "forward+backward": (both, 3.5),
        }
        for name, (call, factor) in calls.items():
            yield {"kernel": f"sparse, {selection}", "pass": name, "flops": flops * factor} | timer(
                call, repeats
            )

    q, k, v = (leaf.detach().transpose(0, 1)[None].requires_grad_() for leaf in leaves[:3])
    dense_upstream = upstream.transpose(0, 1)[None]
    flops = 4 * DIM * HEADS * num_tokens * (num_tokens + 1) // 2
    slow = max(1, min(repeats, 3)) if num_tokens > 65536 else repeats
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )

        def dense_both(dense=dense) -> None:
            torch.autograd.grad(dense(), [q, k, v], dense_upstream)

        for name, call, factor in (("forward", dense, 1), ("forward+backward", dense_both, 3.5)):
            kernel = f"dense, {backend.name.removesuffix('_ATTENTION').lower()}"
            yield {"kernel": kernel, "pass": name, "flops": flops * factor} | timer(call, slow)


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 131072])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    options = parser.parse_args()

    check()
    timer = Timer()
    square = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    ceiling = timer(lambda: square @ square, options.repeats)
    rows: list[dict[str, Any]] = []

    def add(tokens: int, row: dict[str, Any]) -> None:
        row["tflops"] = row.pop("flops") / row["ms"] / 1e9
        rows.append({"tokens": tokens} | row | environment())
        print(
            f"{tokens:>7} {row['kernel']:<15} {row['pass']:<17} {row['ms']:9.2f} ms "
            f"{row['tflops']:6.0f} TFLOP/s {row['extra_gib']:6.2f} GiB",
            flush=True,
        )

    add(0, {"kernel": "matmul 8192^3", "pass": "", "flops": 2 * 8192**3} | ceiling)
    for tokens in options.tokens:
        for row in measure(tokens, timer, options.repeats):
            add(tokens, row)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
