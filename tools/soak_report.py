"""Did a run that was stopped and resumed lose anything? Reads the metrics file of each leg.

    python tools/soak_report.py runs/soak/leg1.jsonl runs/soak/leg2.jsonl runs/soak/leg3.jsonl --steps 500 \\
        --output runs/soak

Writes soak.json and soak.png. Exit status 1 if a step is missing, if a step that was repeated after a restart
has another loss, or if memory grew: in tensors over the whole run, or reserved by the allocator within a
process.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_msa.errors import ConfigError  # noqa: E402
from megatron_msa.training.curves import load_metrics  # noqa: E402

# Steps at each end that are compared, and what memory may grow by between them.
ENDS = 100
MOST_GROWTH = 0.01
# The allocator reserves large segments: the first save of a process, in its second half, made it reserve
# 1.04 % more once, while tensors took no more. Tensors that are kept count above.
MOST_RESERVED_GROWTH = 0.05
# Nats by which a repeated step may differ: on a GPU, atomics sum outputs of experts and their gradients in no
# fixed order, so that weights differ in the last bits of bf16.
MOST_DIFFERENCE = 0.02

Step = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="of each leg, in order")
    parser.add_argument("--steps", type=int, required=True, help="that the whole run should have")
    parser.add_argument("--output", type=Path, required=True, help="folder for soak.json and soak.png")
    options = parser.parse_args(arguments)
    try:
        legs = [{row["iteration"]: row for row in load_metrics(path).steps} for path in options.metrics]
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = summarise(legs, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(legs, options.output / "soak.png")
    print(json.dumps(report))
    for problem in report["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(report["problems"]))


def summarise(legs: Sequence[dict[int, Step]], steps: int) -> dict[str, Any]:
    """The figures of a run made of legs, each a mapping of iterations to rows, and what is wrong with it."""
    final: dict[int, Step] = {}
    repeated: dict[int, float] = {}
    for leg in legs:
        repeated |= {n: abs(leg[n]["lm_loss"] - final[n]["lm_loss"]) for n in leg if n in final}
        final |= leg
    order = sorted(final)
    seconds = sorted(row["seconds"] for leg in legs for row in list(leg.values())[1:])
    report: dict[str, Any] = {
        "steps": len(order),
        "legs": [{"first": min(leg), "last": max(leg)} for leg in legs],
        "loss_first_steps": _mean(final, order[:ENDS], "lm_loss"),
        "loss_last_steps": _mean(final, order[-ENDS:], "lm_loss"),
        "repeated_steps": len(repeated),
        "repeated_steps_largest_difference": max(repeated.values(), default=None),
        "seconds_per_step": {
            "median": round(statistics.median(seconds), 4),
            "p5": round(_quantile(seconds, 0.05), 4),
            "p95": round(_quantile(seconds, 0.95), 4),
            "largest": round(seconds[-1], 4),
        },
    }
    problems = []
    if missing := sorted(set(range(1, steps + 1)) - set(order)):
        problems.append(f"{len(missing)} of {steps} steps are missing, the first {missing[0]}")
    if repeated and max(repeated.values()) > MOST_DIFFERENCE:
        worst = max(repeated, key=repeated.__getitem__)
        problems.append(f"step {worst} was repeated with a loss {repeated[worst]:.3f} away")
    if "memory_gib" in final[order[-1]]:
        report["memory_gib"] = _growth(final, order, "memory_gib", problems)
        # What a process reserves depends on how it began: a restart loads a checkpoint first.
        report["reserved_memory_gib"] = [
            _growth(leg, sorted(leg), "reserved_memory_gib", problems, MOST_RESERVED_GROWTH) for leg in legs
        ]
    if "peak_memory_gib" in final[order[-1]]:
        report["peak_memory_gib"] = max(row["peak_memory_gib"] for row in final.values())
    return report | {"problems": problems}


def _growth(
    rows: dict[int, Step], order: Sequence[int], name: str, problems: list[str], most: float = MOST_GROWTH
) -> dict[str, float]:
    """Means over the first steps (but the very first, which compiles) and the last; growth is a problem."""
    steps = order[1:] or order
    ends = max(1, min(ENDS, len(steps) // 2))
    first, last = (_mean(rows, part, name) for part in (steps[:ends], steps[-ends:]))
    if last > first * (1 + most):
        problems.append(f"{name} grew from {first:.3f} to {last:.3f} in steps {order[0]} to {order[-1]}")
    return {"first_steps": round(first, 3), "last_steps": round(last, 3)}


def _mean(rows: dict[int, Step], order: Sequence[int], name: str) -> float:
    return statistics.fmean(rows[n][name] for n in order)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def draw(legs: Sequence[dict[int, Step]], path: Path) -> None:
    """Loss, seconds per step and memory over the steps, one colour per leg."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for number, leg in enumerate(legs, 1):
        steps = sorted(leg)
        for panel, name in zip(panels, ("lm_loss", "seconds", "memory_gib"), strict=True):
            values = [leg[n].get(name) for n in steps]
            if any(value is not None for value in values):
                panel.plot(steps, values, label=f"leg {number}", linewidth=1)
    for panel, label in zip(panels, ("loss, nats", "seconds per step", "GiB in tensors"), strict=True):
        panel.set_ylabel(label)
    usual = _quantile(sorted(row["seconds"] for leg in legs for row in leg.values()), 0.95)
    panels[1].set_ylim(0, 2 * usual)  # first steps compile and are far above
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("step")
    panels[0].legend(loc="upper right")
    figure.suptitle("stopped by SIGTERM after leg 1, killed after leg 2, resumed each time")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
