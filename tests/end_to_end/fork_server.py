"""Runs programs of this repository in forked processes: importing Megatron takes ten seconds, a tiny run one.

    python tests/end_to_end/fork_server.py        # started by `conftest.py`; JSON lines on stdin and stdout

A forked process starts with the modules imported and nothing else: no arguments, no process group, no model.
It is otherwise a process of its own, with its own environment, output files and exit status.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))


MODULES = (
    "pretrain_msa",  # first: it prepares a machine without a GPU
    "megatron.training",
    "megatron_msa.checkpoint.gqa_to_msa",
    "megatron_msa.data.datasets",
    "megatron_msa.data.preprocess",
    "megatron_msa.training.arguments",
    "megatron_msa.training.dry_run",
    "megatron_msa.training.forward_step",
    "megatron_msa.training.run",
    # What a run imports on its way.
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
)


def _run(request: dict[str, Any]) -> int:
    """The forked process; returns its exit status."""
    os.setpgid(0, 0)  # so that what it leaves behind can be ended with it
    for stream, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if (path := os.environ.get("DIE_BEFORE_RENAMING_TO")) is not None:
        _die_before_renaming_to(path)
    if (node := os.environ.get("PRETENDED_NODE")) is not None:
        this = os.uname()
        os.uname = lambda: os.uname_result((this.sysname, node, this.release, this.version, this.machine))
    if (factor := os.environ.get("SPIKY_LOSS_FACTOR")) is not None:
        from megatron_msa.training import forward_step

        forward_step._SPIKY_LOSS_FACTOR = float(factor)
    sys.argv = [request["program"], *request["arguments"]]
    try:
        if request["program"] == "pretrain_msa.py":
            import pretrain_msa

            record = os.environ.get("RECORD_SELECTIONS_IN")
            if record is None:
                pretrain_msa.main()
            else:
                from tests.parallel.selection_record import SelectionRecord

                selections = SelectionRecord()
                pretrain_msa.main()
                selections.save(Path(record))
        elif request["program"] == "convert_checkpoint.py":
            from tools import convert_checkpoint

            return convert_checkpoint.main()
        else:
            from megatron_msa.data.preprocess import main

            return main(request["arguments"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _die_before_renaming_to(path: str) -> None:
    """End this process like a node failure at the moment when it would rename a file to this path."""
    rename = os.rename

    def rename_or_die(source: Any, target: Any, **kwargs: Any) -> None:
        if os.fspath(target) == path:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **kwargs)

    os.rename = rename_or_die


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported must not reach the replies
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            # Saving a checkpoint starts a process for a queue, which outlives a process that ends abruptly.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(request["wait"], signal.SIGKILL)
            reply = os.waitstatus_to_exitcode(status)
        else:
            reply = os.fork()
            if reply == 0:
                status = _run(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
