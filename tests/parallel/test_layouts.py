"""Every parallel layout gives the single process's numbers, over ten steps and all phases.

The blocks that are selected must be the same to the last one. Losses, gradient norms, per-layer KL and the
change of every parameter differ by fp32 rounding alone: sums over ranks, rows and microbatches are taken in
another order (a few times 6e-8 per step), and ten updates carry it on.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.parallel.checkpoint_tensors import read_parameters
from tests.parallel.conftest import RunLayout
from tests.parallel.ten_steps import TenSteps, differences

SCALARS = 1e-6
PARAMETERS = 1e-5


class Layout(NamedTuple):
    processes: int
    flags: str


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
EP2 = "--expert-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EXPERTS_WHOLE = "--expert-tensor-parallel-size 1"

# In the default suite: what is most likely to break.
COMMON = {
    "TP2+SP x EP2 x CP2, distributed optimizer, full recomputation": Layout(
        4, f"{TP2} {EP2} {EXPERTS_WHOLE} {CP2} {OPTIMIZER} {RECOMPUTE}"
    ),
    "PP2 x VPP2": Layout(2, VPP2),
    "DP2, distributed optimizer": Layout(2, OPTIMIZER),
}
FURTHER = {
    "TP2+SP": Layout(2, TP2),
    "TP2+SP, ETP1": Layout(2, f"{TP2} {EXPERTS_WHOLE}"),
    "TP2+SP x EP2, ETP1": Layout(2, f"{TP2} {EP2} {EXPERTS_WHOLE}"),
    "TP2+SP x EP2, ETP2": Layout(4, f"{TP2} {EP2}"),
    "PP2": Layout(2, PP2),
    "EP2": Layout(2, EP2),
    "DP2": Layout(2, ""),
    "CP2": Layout(2, CP2),
    "CP2, zigzag": Layout(2, f"{CP2} --msa-cp-layout zigzag"),
    "CP4": Layout(4, "--context-parallel-size 4"),
    "TP2+SP x CP2": Layout(4, f"{TP2} {CP2}"),
    "PP2 x CP2": Layout(4, f"{PP2} {CP2}"),
    "PP2 x VPP2 x CP2, full recomputation": Layout(4, f"{VPP2} {CP2} {RECOMPUTE}"),
    "EP2 x CP2": Layout(2, f"{EP2} {CP2}"),
    "DP2 x CP2, distributed optimizer": Layout(4, f"{CP2} {OPTIMIZER}"),
    "TP2+SP x PP2 x VPP2, distributed optimizer": Layout(4, f"{TP2} {VPP2} {OPTIMIZER}"),
}


@pytest.mark.parametrize("name", [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_a_layout_repeats_the_single_process(
    name: str, run_layout: RunLayout, single: TenSteps, initial_checkpoint: Path
) -> None:
    layout = (COMMON | FURTHER)[name]
    initial = read_parameters(initial_checkpoint / "iter_0000001")
    run = run_layout(*layout.flags.split(), processes=layout.processes)
    found = differences(run, single, initial)
    print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in found[1:]) + " |")
    assert found.rows == [], found
    assert max(found.loss, found.grad_norm, found.kl) <= SCALARS, found
    assert found.parameters <= PARAMETERS, found
