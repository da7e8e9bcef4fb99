"""examples/slurm/evaluate.sbatch under a batch system that is two shell scripts."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
JOB_FILE = REPOSITORY / "examples/slurm/evaluate.sbatch"

# Runs the elements of an array one after the other, and what depends on them when they have ended. Prints the
# number of the job, as --parsable does.
SBATCH = """#!/usr/bin/env bash
printf 'sbatch' >> "$CALLS"; printf ' %s' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
number=$(( $(cat "$STATE/last" 2> /dev/null || echo 40) + 1 )); echo $number > "$STATE/last"
elements=none
while [[ "$1" == -* ]]; do
    case "$1" in
        --array=*) elements="$(seq $(tr - ' ' <<< "${1#*=}"))" ;;
        --dependency=afterany:*) [[ -f "$STATE/${1##*:}" ]] || { echo "$number"; exit 0; } ;;
    esac
    shift
done
cp "$1" "$STATE/slurm_script"  # SLURM runs a copy
status=0
for element in $elements; do
    [[ $element == none ]] || export SLURM_ARRAY_TASK_ID=$element
    SLURM_JOB_ID=$number bash "$STATE/slurm_script" "${@:2}" > "$STATE/$number.$element.log" 2>&1 || status=$?
done
echo $status > "$STATE/$number"
echo "$number;cluster"
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == -* ]]; do shift; done; exec "$@"\n'
PYTHON = """#!/usr/bin/env bash
printf 'python' >> "$CALLS"; printf ' %s' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
[[ "$*" != *"--lengths $FAILING "* ]] || exit 2
"""

Submit = Callable[..., tuple["subprocess.CompletedProcess[str]", list[str]]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Runs the job file; returns the completed process and the calls of sbatch and python that came of it."""
    for name, text in {"bin/sbatch": SBATCH, "bin/srun": SRUN, "venv/bin/python": PYTHON}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for folder in ("state", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7")
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CALLS": str(calls),
        "STATE": str(tmp_path / "state"),
        "ACCOUNT": "lab",
        "PARTITION": "gpu",
        "LOGS": str(tmp_path / "logs"),
        "VENV": str(tmp_path / "venv"),
        "GPUS_PER_NODE": "4",
        "CHECKPOINT": str(tmp_path / "run"),
        "OUTPUT": str(tmp_path / "results"),
        "LENGTHS": "1024 4096",
        "TENSOR_PARALLEL": "2",
        "CONTEXT_PARALLEL": "2",
        "FAILING": "none",
    }

    def run(*arguments: str, **changes: str):
        done = subprocess.run(
            [JOB_FILE, *arguments],
            env=environment | changes,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_each_length_is_a_job_and_one_collects_them(submit: Submit, tmp_path: Path) -> None:
    done, calls = submit("--samples", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted 2 lengths as job 41 and their collection as job 42")
    array, *runs, collection, collect = calls
    wanted = (
        "--account=lab",
        "--partition=gpu",
        "--array=0-1",
        "--nodes=1",
        "--gpus-per-node=4",
        "--requeue",
    )
    assert {*wanted} <= {*array.split()}
    for run, length in zip(runs, (1024, 4096), strict=True):
        assert f"--output {tmp_path}/results/length_{length} --lengths {length} " in run
        assert "--tensor-model-parallel-size 2 --context-parallel-size 2 " in run
        assert "--attention msa,dense" in run
        assert run.endswith(" --samples 5")
    assert "--dependency=afterany:41" in collection
    assert "--gpus-per-node" not in collection
    results = tmp_path / "results"
    folders = f"{results}/length_1024 {results}/length_4096"
    assert collect.endswith(f"collect --incomplete --output {results} {folders}")


@pytest.mark.parametrize(("context_parallel", "asks"), [("1", True), ("2", False)])
def test_the_selection_is_measured_where_it_can_be(context_parallel: str, asks: bool, submit: Submit) -> None:
    _, calls = submit(CONTEXT_PARALLEL=context_parallel)
    runs = [call.split() for call in calls if " run --load" in call]
    assert [("selection" in run, "serving" in run) for run in runs] == [(asks, True)] * 2


def test_what_is_there_is_collected_where_a_length_failed(submit: Submit) -> None:
    done, calls = submit(FAILING="1024")
    assert done.returncode == 0, done.stderr
    lengths = [call for call in calls if " run --load" in call]
    assert len(lengths) == 2, "the other length is measured all the same"
    assert " collect --incomplete " in calls[-1]


@pytest.mark.parametrize(
    ("changes", "nodes", "gpus", "tasks"),
    [
        ({"GPUS_PER_NODE": "8"}, 1, "4", 4),
        ({"GPUS_PER_NODE": "4"}, 1, "4", 4),
        ({"GPUS_PER_NODE": "2"}, 2, "2", 2),
        ({"GPUS_PER_NODE": "8", "TENSOR_PARALLEL": "1", "CONTEXT_PARALLEL": "1"}, 1, "1", 1),
        ({"GPUS_PER_NODE": "8", "EXPERT_PARALLEL": "16"}, 2, "8", 8),
        ({"GPUS_PER_NODE": "0"}, 4, None, 1),
        ({"GPUS_PER_NODE": "0", "TENSOR_PARALLEL": "1", "CONTEXT_PARALLEL": "1"}, 1, None, 1),
        ({"GPUS_PER_NODE": "8", "NODES": "64"}, 1, "4", 4),
    ],
)
def test_a_length_takes_as_many_processes_as_share_its_work(
    changes: dict[str, str], nodes: int, gpus: str | None, tasks: int, submit: Submit
) -> None:
    """Further ones would measure the same again, and a part of a node leaves the rest of it to others."""
    done, calls = submit("--dry-run", **changes)
    assert done.returncode == 0, done.stderr
    array = done.stdout.split("\n")[0].split()
    assert {f"--nodes={nodes}", f"--ntasks-per-node={tasks}"} <= {*array}
    assert [word for word in array if "gpus" in word] == ([f"--gpus-per-node={gpus}"] if gpus else [])
    assert ("--mem=0" in array) == (gpus == changes["GPUS_PER_NODE"])
    assert calls == []


@pytest.mark.parametrize("flags", [["--wandb-project", "p", "--wandb-name=n"], ["--wandb-project=p"]])
def test_the_whole_report_is_uploaded_too(flags: list[str], submit: Submit) -> None:
    _, calls = submit("--samples", "5", *flags)
    *_, run, _, collect = calls
    assert run.endswith(f" --samples 5 {' '.join(flags)}")
    assert collect.endswith(f"/length_4096 {' '.join(flags)}")


def test_a_dry_run_shows_every_command_and_submits_nothing(submit: Submit, tmp_path: Path) -> None:
    done, calls = submit("--dry-run", "--samples", "5")
    assert done.returncode == 0, done.stderr
    assert calls == []
    shown = done.stdout.splitlines()
    starts = ["sbatch", "env", "srun", "env", "srun", "sbatch", "env", "srun"]
    assert [line.split()[0] for line in shown] == starts
    assert f"{tmp_path}/venv/bin/python {REPOSITORY}/tools/eval_long_context.py run --load" in shown[2]
    assert "--lengths 4096" in shown[4]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ACCOUNT": "", "OUTPUT": ""}, "error: OUTPUT is not set; fill it in in examples/slurm/site.sh"),
        ({"CHECKPOINT": "/nowhere"}, "CHECKPOINT /nowhere holds no checkpoint"),
        ({"GPUS_PER_NODE": "3"}, "a length has 4 processes (TENSOR_PARALLEL x CONTEXT_PARALLEL, or"),
        ({"TENSOR_PARALLEL": "two"}, "TENSOR_PARALLEL is 'two'; it must be a positive number"),
        ({"EXPERT_PARALLEL": "6"}, "EXPERT_PARALLEL is 6 and TENSOR_PARALLEL x CONTEXT_PARALLEL is 4"),
        ({"LENGTHS": "4096,8192"}, "LENGTHS has '4096,8192'; it must hold numbers of tokens"),
        ({"LENGTHS": " "}, "LENGTHS is empty"),
    ],
)
def test_nothing_is_submitted_with_a_missing_or_wrong_value(
    changes: dict[str, str], message: str, submit: Submit
) -> None:
    done, calls = submit(**changes)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls == []


def test_the_arguments_are_those_of_the_tool(submit: Submit, tmp_path: Path) -> None:
    from megatron_msa.evaluation.command import build_parser

    _, calls = submit()
    for call in calls:
        if call.startswith("python"):
            words = call.split("eval_long_context.py ")[1].split()
            options = build_parser(None).parse_args(words)
            assert str(options.output).startswith(str(tmp_path / "results"))
