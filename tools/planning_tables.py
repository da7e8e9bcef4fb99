"""The tables of docs/planning.md: predictions beside measurements; the recipes on 128, 512 and 2,048 H100.

python tools/planning_tables.py
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

from megatron_msa.training import no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron is imported

from megatron_msa.errors import ConfigError  # noqa: E402
from megatron_msa.planning import cluster as clusters  # noqa: E402
from megatron_msa.planning import comparison, plan, report  # noqa: E402
from megatron_msa.planning.rates import Assumptions, load_rates  # noqa: E402
from megatron_msa.planning.request import read_command  # noqa: E402
from tools.plan import MEASUREMENTS  # noqa: E402

VOCABULARY = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "200000"]
BYTES = ["--vocab-size", "258"]
SLICES = REPOSITORY / "docs/results/plan_h200"
SMALL_MODEL_PEAK_GIB = 10.1
"""Of the run of examples/single_gpu on bytes: docs/results.md."""
STAGES = ("8k", "32k", "192k", "1m")
NODES = (16, 64, 256)


def cluster(gpu: str, nodes: int, gpus_per_node: int = 8) -> clusters.Cluster:
    """With the assumed links."""
    assumed = Assumptions()
    return clusters.Cluster(
        gpu=clusters.gpu(gpu),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        node_gb_per_s=assumed.node_gb_per_s,
        network_gb_per_s=assumed.network_gb_per_s,
        reserved_gib=assumed.reserved_gib,
    )


def flags(script: str, *arguments: str) -> list[str]:
    """What a recipe passes to pretrain_msa.py."""
    printer = str(REPOSITORY / "examples/common/print_arguments.sh")
    python = printer if script.startswith("single_gpu") else sys.executable
    variables = {"LAUNCH": printer, "SAVE": "runs/none", "PYTHON": python}
    command = [REPOSITORY / "examples" / script, *arguments, *VOCABULARY]
    output = subprocess.run(
        command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
    )
    return output.stdout.splitlines()[1:]


def measured() -> Iterator[str]:
    """Predictions beside measurements."""
    yield "| what | predicted | measured | |"
    yield "|---|---|---|---|"
    two = cluster("H200", 1, gpus_per_node=2)
    rates = load_rates(MEASUREMENTS.with_earlier_kernels(), two.gpu)
    found = comparison.attention_layer(MEASUREMENTS.layer, two, rates)
    small = read_command([*flags("single_gpu/pretrain.sh"), *BYTES], 1)
    found += comparison.small_model(small, MEASUREMENTS.small_model, SMALL_MODEL_PEAK_GIB, two, rates)
    found += comparison.slices(SLICES, two, rates)
    for each in found:
        yield each.row()


def stages(nodes: int) -> Iterator[str]:
    """The recipe's layout, and the best one, of each stage on so many nodes of H100."""
    header, line = report.HEADER
    yield f"| stage | {header[2:]}"
    yield f"|---{line}"
    here = cluster("H100", nodes)
    rates = load_rates(MEASUREMENTS, here.gpu)
    for stage in STAGES:
        command = flags("msa_109b/pretrain.sh", stage)
        for name, with_layout in (("recipe", True), ("best", False)):
            try:
                request = read_command(command, here.gpus, with_layout=with_layout)
                if with_layout:
                    best = plan.make_plan(request, request.layout(), here, rates)
                    plan.check_memory(best)
                else:
                    best = plan.search(request, here, rates)[0]
            except ConfigError as error:
                reason = str(error).partition("; ")[0]  # without the advice
                yield f"| {stage}, {name} | refused: {reason} | | | | | | |"
                continue
            yield f"| {stage}, {name} {report.row(best)}"


def main() -> None:
    print("\n".join(measured()), end="\n\n")
    for nodes in NODES:
        print(f"### {nodes * 8:,} H100\n")
        print("\n".join(stages(nodes)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
