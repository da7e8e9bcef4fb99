"""Processes that `srun` starts one by one, without torchrun: their rank is in SLURM's variables.

torchrun ends its processes 30 seconds after it has received SIGTERM, which is too short for saving; with one
process per GPU started by `srun`, the signal reaches the training program alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PORTS = range(20_000, 60_000)


def adopt(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that it says what torchrun would have.

    Args:
        environment: of this process. SLURM_STEP_NUM_TASKS is in that of an `srun` step only, and not in that
            of a batch script or a shell in an allocation, where one process would wait for others.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, less those that are set; nothing outside of
        SLURM, under torchrun, and in a step of one process.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or size == "1":
        return {}
    values = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[int(environment["SLURM_JOB_ID"]) % len(_PORTS)]),
    }
    return {name: value for name, value in values.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first name of a host list: ``gpu[07-09,12],login1`` begins with gpu07.

    Brackets may occur several times in a name.
    """
    name = ""
    for text, numbers in re.findall(r"([^\[,]+)|\[([^\]]*)\]|,", nodes):
        if text:
            name += text
        elif numbers:
            name += re.split(r"[-,]", numbers)[0]
        else:
            break
    return name
