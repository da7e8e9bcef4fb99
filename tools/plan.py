"""Memory, step time, traffic and days of a training command on a cluster, and the layout that suits it best.

    python tools/plan.py --gpu H100 --nodes 64 -- FLAGS OF pretrain_msa.py
    LAUNCH="python tools/plan.py --nodes 64 --search 5 --" examples/msa_109b/pretrain.sh 8k ...

Nothing is started and no GPU is needed. Rates are those measured on one NVIDIA H200; docs/planning.md says
what is assumed. A layout that cannot work or does not fit is refused with the reason and status 2.
"""

import argparse
import math
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

from megatron_msa.training import no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron is imported

from megatron_msa.errors import ConfigError  # noqa: E402
from megatron_msa.planning import cluster as clusters  # noqa: E402
from megatron_msa.planning.rates import Assumptions, Measurements, load_rates  # noqa: E402

MEASUREMENTS = Measurements(
    rows=REPOSITORY / "kernels/benchmarks/results/rows.csv",
    earlier_rows=REPOSITORY / "docs/results/plan_h200/kernel_rows.csv",
    layer=REPOSITORY / "docs/results/context_parallel_h200x2/layer.json",
    small_model=REPOSITORY / "docs/results/single_gpu_h200/metrics_triton.jsonl",
    small_model_layers=8,
    host=REPOSITORY / "docs/results/plan_h200/slice_8k_te.host.json",
    host_steps=REPOSITORY / "docs/results/plan_h200/slice_8k_te.jsonl",
    gpu=clusters.GPUS["H200"],
)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the flags of the training command behind `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assumed = Assumptions()
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(clusters.GPUS)} (default: H100)")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--node-gb-per-s", type=float, default=assumed.node_gb_per_s, help="between GPUs of a node, per GPU"
    )
    parser.add_argument(
        "--network-gb-per-s", type=float, default=assumed.network_gb_per_s, help="between nodes, per GPU"
    )
    parser.add_argument("--reserved-gib", type=float, default=assumed.reserved_gib)
    parser.add_argument(
        "--host-speed",
        type=float,
        default=assumed.host_speed,
        help="of a core that launches kernels, relative to the host that was measured (default: 1)",
    )
    parser.add_argument(
        "--search", type=int, metavar="N", help="ignore the command's layout and show the N fastest ones"
    )
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    options, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if flags and flags[0].endswith("pretrain_msa.py"):  # from a recipe, through LAUNCH
        flags = flags[1:]
    if not flags:
        parser.error("the flags of a training command are missing; put them behind --")
    return options, flags


def main() -> int:
    options, flags = parse()
    try:
        for name, least in (("nodes", 1), ("gpus_per_node", 1), ("search", 1), ("reserved_gib", 0)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in ("node_gb_per_s", "network_gb_per_s", "host_speed"):
            if not 0 < (value := getattr(options, name)) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and finite")
        cluster = clusters.Cluster(
            gpu=clusters.gpu(options.gpu),
            nodes=options.nodes,
            gpus_per_node=options.gpus_per_node,
            node_gb_per_s=options.node_gb_per_s,
            network_gb_per_s=options.network_gb_per_s,
            reserved_gib=options.reserved_gib,
        )
        rates = load_rates(MEASUREMENTS, cluster.gpu, Assumptions(host_speed=options.host_speed))
        from megatron_msa.planning import plan, report
        from megatron_msa.planning.request import read_command

        if options.search is not None:
            request = read_command(flags, cluster.gpus, with_layout=False)
            found = plan.search(request, cluster, rates)
            print("\n".join(report.layouts(found[: options.search])), end="\n\n")
            best = found[0]
        else:
            request = read_command(flags, cluster.gpus)
            best = plan.make_plan(request, request.layout(), cluster, rates)
            plan.check_memory(best)
        print(report.describe(best))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
