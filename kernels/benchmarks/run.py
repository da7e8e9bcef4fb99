"""Runs the benchmarks: checks every result against the reference, then times ours and the baselines in turn.

    python kernels/benchmarks/run.py --suite bars                   # the project's bars: one GPU, 4 minutes
    python kernels/benchmarks/run.py --suite quick                  # under a minute
    python kernels/benchmarks/run.py --suite full --only published  # one group of the full suite
    python kernels/benchmarks/run.py --suite decode                 # new tokens over a cache, two minutes
    python kernels/benchmarks/run.py --device cpu --tiny            # the whole path without a GPU, in seconds
    python kernels/benchmarks/run.py --table                        # Markdown tables of the last run

Writes rows.csv, summary.json and speedup.png into --output, as it goes. A wrong result of ours is not timed:
its bar has no value, and the exit status is 1. See README.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import environment, plot, rows, summary, tables
from benchmarks.experiments import Suite
from benchmarks.measure import BUDGET_MS, TINY_BUDGET_MS, Ceilings, left_out, measure
from benchmarks.rows import Row
from benchmarks.timing import Clock, CpuClock, CudaClock, Memory

RESULTS = Path(__file__).parent / "results"
SUITES = ("quick", "bars", "full", "decode")


def main(arguments: list[str] | None = None) -> int:
    """See the top of the file; returns the exit status."""
    options = _parse(arguments)
    if options.table:
        return _print_tables(options.output)
    device = torch.device(options.device)
    suite = Suite(options.suite, device, tiny=options.tiny, only_shapes=options.shapes or ())
    groups = suite.groups()
    names = list(dict.fromkeys(name for name, _ in groups))
    if unknown := set(options.only or []) - set(names):
        print(
            f"--only {' '.join(sorted(unknown))}: suite {suite.name} has {', '.join(names)}", file=sys.stderr
        )
        return 2
    shapes = (*suite.contexts.values(), *suite.real_shapes, *suite.decode_shapes.values())
    known = {shape.name for shape in shapes}
    if unknown := set(options.shapes or []) - known:
        print(f"--shapes {' '.join(sorted(unknown))}: known are {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: use --device cpu --tiny to try the runner without one", file=sys.stderr)
        return 2

    start = time.monotonic()
    facts = environment.describe(device, options.commit)
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    memory = Memory(device)
    ceilings = Ceilings(device, suite.heads.dtype, clock, tiny=options.tiny)
    budget = TINY_BUDGET_MS if options.tiny else BUDGET_MS
    earlier = options.output / "rows.csv"
    kept = rows.read(earlier) if earlier.exists() else []
    if not options.merge:
        kept = [row for row in kept if row.group not in names]
    measured: list[Row] = []
    broken = False
    for name, experiments in groups:
        if options.only and name not in options.only:
            continue
        try:
            for experiment in experiments():
                if options.ours:
                    own = [each for each in experiment.candidates if each.is_ours]
                    experiment = experiment._replace(candidates=own)
                left_s = options.seconds - (time.monotonic() - start)
                if experiment.expected_s > left_s:
                    found = left_out(experiment, facts, f"{options.seconds:.0f} seconds were given")
                else:
                    found = measure(experiment, clock, memory, ceilings, facts, budget_ms=budget)
                for row in found:
                    print(f"{time.monotonic() - start:6.1f} s", _line(row), flush=True)
                measured += found
                # Whatever ends the run early leaves what it has.
                _write(_merged(kept, measured), options.output)
                del experiment
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        except Exception:  # the other groups are still worth their time
            traceback.print_exc()
            print(f"group {name} ended early", flush=True)
            broken = True
        if name == "context":
            plot.draw(_merged(kept, measured), options.output / "speedup.png")
    return _conclude(_merged(kept, measured), options.output) or int(broken)


def _write(all_rows: list[Row], output: Path) -> dict[str, Any]:
    rows.write(output / "rows.csv", all_rows)
    figures = summary.summarize(all_rows)
    summary.write(output / "summary.json", figures)
    return figures


def _conclude(all_rows: list[Row], output: Path) -> int:
    figures = _write(all_rows, output)
    print(tables.bars(figures))
    for line in figures["not_measured"]:
        print("not measured:", line)
    for line in figures["wrong_results"]:
        print("wrong:", line, file=sys.stderr)
    return int(bool(figures["wrong_results"]))


def _print_tables(output: Path) -> int:
    for name in ("rows.csv", "summary.json"):
        if not (output / name).exists():
            print(f"{output / name} is missing: run the benchmarks first", file=sys.stderr)
            return 2
    print(
        tables.everything(rows.read(output / "rows.csv"), json.loads((output / "summary.json").read_text()))
    )
    return 0


def _merged(kept: list[Row], measured: list[Row]) -> list[Row]:
    """Old rows that were not measured again, then the new ones."""
    new = {row.key for row in measured}
    return [row for row in kept if row.key not in new] + measured


def _line(row: Row) -> str:
    head = f"{row.shape:<8} {row.op:<17} {row.candidate:<28} {row.pattern:<7}"
    if not row.passed:
        return f"{head} {row.check}"
    parts = [f"{row.ms:10.3f} ms ({row.ms_p20:.3f} .. {row.ms_p80:.3f}, {row.repeats})"]
    if row.tflops is not None and row.share_of_matmul is not None:
        parts.append(f"{row.tflops:6.1f} TFLOP/s ({100 * row.share_of_matmul:.0f} %)")
    if row.tbps is not None and row.share_of_copy is not None:
        parts.append(f"{row.tbps:5.2f} TB/s ({100 * row.share_of_copy:.0f} %)")
    if row.extra_gib is not None:
        parts.append(f"{row.extra_gib:6.2f} GiB")
    return f"{head} {'  '.join(parts)}  error {row.check_error:.2f} of limit"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="bars")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of the suite to run")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="names in registry.py; all if left out")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing that would not end within them"
    )
    parser.add_argument("--ours", action="store_true", help="leave the baselines out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes under the names of the real ones")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="keep rows of the suite's groups, too, that are not measured again",
    )
    parser.add_argument("--commit", help="for a copy of the repository without its history")
    parser.add_argument("--table", action="store_true", help="print tables of --output and measure nothing")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the reference operators cannot run the real sizes")
    return options


if __name__ == "__main__":
    sys.exit(main())
