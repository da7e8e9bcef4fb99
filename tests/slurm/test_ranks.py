"""The environment that srun gives a process, and what the training program makes of it."""

import pytest

from megatron_msa.training.slurm_ranks import adopt, first_host

# As SLURM 22.05 set it for the second of two processes on two nodes (less what does not matter).
STEP = {
    "SLURM_JOB_ID": "41001",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
}
# The batch script of the same job: the variables of a process, but it is not one of two.
BATCH = {"SLURM_JOB_ID": "41001", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_a_process_of_a_step_gets_its_rank_and_the_place_to_meet() -> None:
    assert adopt(STEP) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "21001",
    }


def test_all_processes_of_a_job_meet_at_one_port_and_neighbouring_jobs_at_others() -> None:
    assert adopt(STEP | {"SLURM_PROCID": "0"})["MASTER_PORT"] == adopt(STEP)["MASTER_PORT"]
    assert adopt(STEP | {"SLURM_JOB_ID": "41002"})["MASTER_PORT"] != adopt(STEP)["MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        STEP | {"RANK": "5", "WORLD_SIZE": "8"},  # torchrun, started by srun on each node
    ],
    ids=["no SLURM", "batch script", "one process", "torchrun"],
)
def test_nothing_is_taken_from_slurm_where_it_did_not_start_the_processes(
    environment: dict[str, str],
) -> None:
    assert adopt(environment) == {}


def test_an_address_that_is_given_stays() -> None:
    assert "MASTER_ADDR" not in adopt(STEP | {"MASTER_ADDR": "10.0.0.1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a-1,b-2", "a-1"),
        ("rack[1-2]node[03,05]", "rack1node03"),
        ("n[12]-ib", "n12-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
