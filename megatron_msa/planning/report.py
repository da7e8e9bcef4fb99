"""Plans as text: one in detail, or several as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_msa.planning.plan import Plan


def describe(plan: Plan) -> str:
    """A plan in detail."""
    request, layout, cluster, step = plan.request, plan.layout, plan.cluster, plan.step
    tokens = plan.tokens_per_step
    lines = [
        f"{cluster.gpus} {cluster.gpu.device_name} in {cluster.nodes} nodes: {layout.describe()}, "
        f"{plan.microbatches} microbatches of {layout.micro_batch} x {request.seq_length:,} tokens",
        "  " + " ".join(layout.flags()),
        "",
        f"Memory, GiB per rank ({cluster.gpu.memory_gib:g} there, {cluster.reserved_gib:g} of them reserved)",
    ]
    names = list(plan.memory[0].in_gib())
    lines.append("  stage   total  " + "  ".join(names))
    for rank, memory in enumerate(plan.memory):
        parts = memory.in_gib()
        values = "  ".join(f"{parts[name]:>{len(name)}.1f}" for name in names)
        lines.append(f"  {rank:>5}  {memory.gib:>6.1f}  {values}")
    lines += [
        "  total: the first four, and the larger of the loss and what a running layer needs",
        "",
        f"One step in the {plan.phase.value} phase, {tokens:,} tokens",
        f"  FLOPs per token               executed {plan.flops.executed / tokens:.4g}, dense-equivalent "
        f"{plan.flops.dense_equivalent / tokens:.4g}",
        f"  time                          {step.total:.2f} s: {plan.tokens_per_second:,.0f} tokens/s per "
        f"GPU, MFU {plan.mfu:.1%}",
    ]
    m = step.microbatches
    shares = {
        "attention kernels": m * step.stage.attention,
        "matrix products": m * step.stage.products,
        "norms, rotary, activations": m * step.stage.other,
        "output projection and loss": m * step.output,
        "recomputation": m * step.stage.recomputed,
        "waiting for the host": step.waiting_for_host,
        "tensor parallelism": m * step.stage.tensor_comm,
        "experts' all-to-all": m * step.stage.expert_comm,
        "keys of other ranks": m * step.stage.context_comm,
        "between stages": step.pipeline_comm,
        "gradients and parameters": step.data_comm,
        "pipeline bubble": step.bubble,
        "optimizer": step.optimizer,
    }
    lines += [
        f"    {name:<30}{value:>8.2f} s {value / step.total:>6.1%}" for name, value in shares.items() if value
    ]
    if step.waiting_for_host > _HOST_SHARE * step.total:
        lines.append("    " + host_advice(plan))
    traffic = {name.replace("_", " "): value / 1e9 for name, value in vars(plan.traffic).items() if value}
    lines.append(
        "  received per rank, GB         "
        + ", ".join(f"{name} {value:.1f}" for name, value in traffic.items())
    )
    if request.iterations:
        total = request.iterations * tokens
        lines += ["", f"The run: {total / 1e9:,.0f}B tokens in {plan.days:.1f} days without interruption"]
    return "\n".join(lines)


_HOST_SHARE = 0.05


def host_advice(plan: Plan) -> str:
    """What a plan says when its GPUs wait for launches."""
    layout = plan.layout
    tokens = plan.request.seq_length * layout.micro_batch // (layout.context * layout.tensor)
    return (
        f"The host is the limit: {tokens:,} tokens of a rank and microbatch are computed sooner than "
        "launched. More of them help (--micro-batch-size, less context or tensor parallelism), fewer experts "
        "per rank, a faster host (--host-speed of tools/plan.py), fewer launches (CUDA graphs, not tried "
        "here), and, where a step has few microbatches, --no-check-for-nan-in-loss-and-grad"
    )


HEADER = (
    "| layout | microbatches | GiB per GPU | step, s | tokens/s per GPU | MFU | days |",
    "|---|---|---|---|---|---|---|",
)


def row(plan: Plan) -> str:
    """One line of a table under `HEADER`."""
    return (
        f"| {plan.layout.describe()} | {plan.microbatches} | {plan.peak_gib:.0f} | {plan.step.total:.2f} | "
        f"{plan.tokens_per_second:,.0f} | {plan.mfu:.1%} | {plan.days:.1f} |"
    )


def layouts(plans: Sequence[Plan]) -> list[str]:
    """A table of plans."""
    return [*HEADER, *(row(plan) for plan in plans)]
