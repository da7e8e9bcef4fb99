"""The batch jobs of examples/long_context_eval, run by a batch system that is two shell scripts."""

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_context_eval"

# Runs the elements of the array one after the other, and what depends on them if all ended well. Prints the
# job's number, as --parsable does.
SBATCH = """#!/usr/bin/env bash
printf 'sbatch' >> "$CALLS"; printf ' %s' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS"
number=$(( $(cat "$STATE/last" 2> /dev/null || echo 40) + 1 )); echo $number > "$STATE/last"
script="${!#}"; elements=""
while (( $# > 1 )); do
    case "$1" in
        --export) IFS=, read -ra pairs <<< "$2"; export "${pairs[@]:1}" ;;
        --array) elements="$(seq ${2/-/ })" ;;
        --dependency) [[ "$(cat "$STATE/${2#afterok:}")" == 0 ]] || { echo "$number"; exit 0; } ;;
    esac
    shift
done
status=0
for element in ${elements:-none}; do
    SLURM_ARRAY_TASK_ID=$element bash "$script" > "$STATE/$number.$element.log" 2>&1 || status=$?
done
echo $status > "$STATE/$number"
echo "$number;cluster"
"""
RECORD = """#!/usr/bin/env bash
{ printf '%s' "$(basename "$0")"; printf ' %s' "$@"; printf '\\n'; } >> "$CALLS"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a site file and submits it; returns the completed process and the calls that were made."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "sbatch": SBATCH,
        "srun": RECORD + 'while [[ "$1" == -* ]]; do shift; done; exec "$@"\n',
        "torchrun": RECORD + '[[ "$*" != *"--lengths $FAILING "* ]]\n',
        "python": RECORD,
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "state").mkdir()
    calls = tmp_path / "calls"
    checkpoint = tmp_path / "run"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("7")
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "STATE": str(tmp_path / "state"),
        "FAILING": "none",
    }
    values = {
        "ACCOUNT": "lab",
        "PARTITION": "gpu",
        "GPUS_PER_JOB": "4",
        "SETUP": "export READY=yes",
        "CHECKPOINT": str(checkpoint),
        "OUTPUT": str(tmp_path / "results"),
        "TENSOR_PARALLEL": "2",
        "CONTEXT_PARALLEL": "2",
    }

    def submit(*, failing: str = "none", **changes: str):
        path = tmp_path / "my_site.sh"
        path.write_text(
            (EXAMPLE / "site.sh").read_text()
            + "".join(f'{name}="{value}"\n' for name, value in (values | changes).items())
            + "LENGTHS=(1024 4096)\n"
        )
        done = subprocess.run(
            [EXAMPLE / "submit.sh", path],
            env=environment | {"FAILING": failing},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return submit


def test_each_length_is_a_job_and_one_collects_them(site, tmp_path):
    done, calls = site()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted 2 lengths as job 41 and their collection as job 42")
    array, *_ = (call for call in calls if call.startswith("sbatch"))
    for option in ("--account lab", "--partition gpu", "--array 0-1", "--gpus-per-node 4", "--time 02:00:00"):
        assert option in array
    runs = [call for call in calls if call.startswith("torchrun")]
    assert len(runs) == 2
    for run, length in zip(runs, (1024, 4096), strict=True):
        assert f"--output {tmp_path}/results/length_{length} --lengths {length} " in run
        assert "--nproc-per-node 4 " in run
        assert "--tensor-model-parallel-size 2 --context-parallel-size 2 " in run
        assert "--attention msa,dense" in run
    (collect,) = (call for call in calls if call.startswith("python"))
    results = tmp_path / "results"
    assert collect.endswith(f"collect --output {results} {results}/length_1024 {results}/length_4096")
    assert "--dependency afterok:41" in calls[calls.index(runs[1]) + 1]


def test_nothing_is_collected_where_a_length_failed(site):
    done, calls = site(failing="1024")
    assert done.returncode == 0
    assert sum(call.startswith("torchrun") for call in calls) == 2, (
        "the other length is measured all the same"
    )
    assert not any(call.startswith("python") for call in calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ACCOUNT": "", "OUTPUT": ""}, "error: ACCOUNT OUTPUT not set in"),
        ({"CHECKPOINT": "/nowhere"}, "CHECKPOINT /nowhere holds no checkpoint"),
        ({"GPUS_PER_JOB": "8"}, "GPUS_PER_JOB is 8, but TENSOR_PARALLEL x CONTEXT_PARALLEL is 4"),
    ],
)
def test_nothing_is_submitted_with_a_missing_or_wrong_value(changes, message, site):
    done, calls = site(**changes)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls == []


def test_the_values_as_shipped_are_refused():
    done = subprocess.run([EXAMPLE / "submit.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "ACCOUNT PARTITION GPUS_PER_JOB SETUP CHECKPOINT OUTPUT not set in" in done.stderr


def test_the_arguments_are_those_of_the_tool(site, tmp_path):
    from megatron_msa.evaluation.command import build_parser

    _, calls = site()
    for call in calls:
        if " run --load" in call or " collect " in call:
            words = call.split("eval_long_context.py ")[1].split()
            options = build_parser(None).parse_args(words)
            assert str(options.output).startswith(str(tmp_path / "results"))
