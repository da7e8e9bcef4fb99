"""Where the time of an operator call goes: every kernel that one call of ours launches, by its time.

    python kernels/benchmarks/profile_kernels.py --shapes 32k 128k --ops prefill train --patterns index local
    python kernels/benchmarks/profile_kernels.py --device cpu --tiny --shapes 4k   # the path without a GPU

Prints a table per call and writes profile.csv into --output. The times are of warm calls under torch's
profiler: they say how a call is made up, and rows.csv how long it takes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment, ours
from benchmarks.candidate import Candidate
from benchmarks.ours import Problem
from benchmarks.registry import PATTERNS, STANDARD, TINY, contexts, real_shapes

OPS: dict[str, Callable[[Problem, str], Candidate]] = {
    "prefill": ours.prefill,
    "forward": lambda problem, pattern: ours.forward(problem, pattern, with_kl=False),
    "forward with KL": lambda problem, pattern: ours.forward(problem, pattern, with_kl=True),
    "backward with KL": ours.backward,
    "train": ours.train,
}


class KernelTime(NamedTuple):
    """Launches of one kernel within a call, and their milliseconds together."""

    kernel: str
    launches: int
    ms: float


def main(arguments: list[str] | None = None) -> int:
    """See the top of the file; returns the exit status."""
    options = _parse(arguments)
    device = torch.device(options.device)
    known = {shape.name: shape for shape in (*contexts(options.tiny).values(), *real_shapes(options.tiny))}
    if unknown := set(options.shapes) - set(known):
        print(f"--shapes {' '.join(sorted(unknown))}: known are {', '.join(known)}", file=sys.stderr)
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: use --device cpu --tiny to try this without one", file=sys.stderr)
        return 2
    facts = environment.describe(device, options.commit)
    found: list[dict[str, Any]] = []
    for name in options.shapes:
        problem = Problem(
            known[name],
            TINY if options.tiny else STANDARD,
            device,
            needs_gradients=not {"train", "backward with KL"}.isdisjoint(options.ops),
        )
        for pattern in options.patterns:
            for op in options.ops:
                times = kernel_times(OPS[op](problem, pattern).start().run, device)
                print(f"\n{name} {op} {pattern}: {sum(each.ms for each in times):.2f} ms in kernels")
                for each in times[: options.top]:
                    print(f"  {each.ms:9.3f} ms  {each.launches:4d} x  {each.kernel}", flush=True)
                call = {"shape": name, "op": op, "pattern": pattern}
                found += [{**call, **each._asdict(), "ms": f"{each.ms:.4f}", **facts} for each in times]
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "profile.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    return 0


def kernel_times(call: Callable[[], Any], device: torch.device) -> list[KernelTime]:
    """Kernels of a second call, longest first; operators of PyTorch where there is no GPU."""
    on_gpu = device.type == "cuda"
    call()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, KernelTime] = {}
    for each in found.key_averages():
        name = without_template(each.key)
        ms = (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e3
        if ms > 0:
            before = times.get(name, KernelTime(name, 0, 0.0))
            times[name] = KernelTime(name, before.launches + each.count, before.ms + ms)
    return sorted(times.values(), key=lambda each: -each.ms)


def without_template(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters, which fill lines in C++."""
    if "::" not in kernel or kernel.startswith("aten::"):
        return kernel
    return kernel.split("<")[0].split("::")[-1].split("(")[0]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["32k", "128k"])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["prefill"])
    parser.add_argument("--patterns", nargs="+", choices=("index", *PATTERNS), default=["index"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Small sizes under the names of the real ones.")
    parser.add_argument("--top", type=int, default=12, help="Kernels to print per call.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="Written into profile.csv where there is no Git history.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
