"""How long a training process takes to launch kernels, from a profiler trace of a model with MSA layers only.

    pretrain_msa.py ... --profile --use-pytorch-profiler --profile-step-start 57 --profile-step-end 59
    python tools/host_trace.py TRACE.json.gz --experts 16 > docs/results/plan_h200/slice_8k_te.host.json

Milliseconds of the host per step, the mean over the profiled steps, for layers of Transformer Engine with one
microbatch per step. `megatron_msa/planning/rates.py` scales them to the steps that no profiler slows down.
"""

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]

ATTENTION, EXPERTS = "_SparseAttention", "_GroupedLinear"
BACKWARD = "autograd::engine::evaluate_function: "
ACCUMULATE = BACKWARD + "torch::autograd::AccumulateGrad"
GATHER = "c10d::allgather"


def step_parts(events: Sequence[Event], start: float, end: float, experts: int) -> dict[str, float]:
    """Of one step.

    Args:
        events: operations of the host, with children.
        start, end: of the step, microseconds.
        experts: of a layer, on this rank.

    Returns:
        total; layers, moe_layers: their numbers; moe_forward, moe_backward: of one expert layer without what
        goes with its experts; expert_forward, expert_backward: for each of them; dense_forward,
        dense_backward; ends: embedding, output, loss, data; buckets: checks of gradients and launches of
        their reduction and of the gathering of parameters; optimizer.
    """
    inside = sorted((e for e in events if start <= e["ts"] < end), key=lambda e: e["ts"])
    backward = [e for e in inside if e["name"].startswith(BACKWARD)]
    thread = backward[0]["tid"]
    forward = [e for e in inside if e["tid"] != thread]
    inside = [e for e in inside if e["tid"] == thread]

    checks = [e["ts"] for e in inside if e["name"] == "aten::isnan"]
    hooks, launches = [], []
    for event in backward:
        if event["name"] == ACCUMULATE:
            is_last = any(event["ts"] <= ts < event["ts"] + event["dur"] for ts in checks)
            (launches if is_last else hooks).append(event)
    launches += [e for e in forward if e["name"].startswith(GATHER)]
    hook = statistics.mean(e["dur"] for e in hooks)

    def spans(found: list[Event], marker: str, grouped: str) -> tuple[list[float], list[float]]:
        """From the attention of a layer to that of the next: of expert layers, and of dense ones."""
        starts = [e["ts"] for e in found if e["name"] == marker]
        experts_, dense = [], []
        for low, high in pairwise(starts):
            span = high - low - sum(e["dur"] for e in launches if low <= e["ts"] < high)
            products = [e["dur"] for e in found if e["name"] == grouped and low <= e["ts"] < high]
            (experts_ if products else dense).append(span - sum(products))
        return experts_, dense

    forward_spans = spans(forward, ATTENTION, EXPERTS)
    backward_name = BACKWARD + ATTENTION + "Backward"
    backward_spans = spans(backward, backward_name, f"{BACKWARD}{EXPERTS}Backward")
    layers = sum(e["name"] == ATTENTION for e in forward)
    forward_products = [e["dur"] for e in forward if e["name"] == EXPERTS]
    backward_products = [e["dur"] for e in backward if e["name"] == f"{BACKWARD}{EXPERTS}Backward"]
    moe_layers = len(forward_products) // 2
    last = max(e["ts"] + e["dur"] for e in backward)
    parts = {
        "moe_forward": statistics.mean(forward_spans[0]),
        # Each expert has two matrices, with a hook each.
        "moe_backward": statistics.mean(backward_spans[0]) - 2 * experts * hook,
        "expert_forward": sum(forward_products) / moe_layers / experts,
        "expert_backward": sum(backward_products) / moe_layers / experts + 2 * hook,
        "dense_forward": statistics.mean(forward_spans[1]),
        "dense_backward": statistics.mean(backward_spans[1]),
        "buckets": sum(e["dur"] for e in launches),
        "optimizer": end - last,
    }
    moe = sum(parts[f"moe_{name}"] + experts * parts[f"expert_{name}"] for name in ("forward", "backward"))
    dense = parts["dense_forward"] + parts["dense_backward"]
    parts["ends"] = end - start - parts["optimizer"] - parts["buckets"] - moe_layers * moe
    parts["ends"] -= (layers - moe_layers) * dense
    milliseconds = {name: value / 1e3 for name, value in parts.items()}
    return {"total": (end - start) / 1e3, "layers": layers, "moe_layers": moe_layers} | milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of the file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--experts", type=int, required=True, help="of a layer, on this rank")
    options = parser.parse_args(arguments)
    opened = gzip.open if options.trace.suffix == ".gz" else open
    with opened(options.trace, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    steps = [
        step_parts(
            [e for e in events if e.get("cat") == "cpu_op"], e["ts"], e["ts"] + e["dur"], options.experts
        )
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep")
    ]
    if not steps:
        print(f"error: {options.trace} has no profiled step", file=sys.stderr)
        return 2
    mean = {name: round(statistics.mean(step[name] for step in steps), 3) for name in steps[0]}
    print(json.dumps({"steps": len(steps), "experts": options.experts} | mean, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
