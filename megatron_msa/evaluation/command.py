"""`tools/eval_long_context.py`: measure a checkpoint, collect results, draw them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import cell_file, plots, report, versions, wandb_upload
from megatron_msa.evaluation.checkpoint_subject import Checkpoint, EngineOptions, open_checkpoint
from megatron_msa.evaluation.haystack import read_haystack
from megatron_msa.evaluation.plan import ATTENTION_MODES, MEASUREMENTS, Plan, evenly
from megatron_msa.evaluation.run import Settings, evaluate
from megatron_msa.evaluation.scoring import METHODS
from megatron_msa.evaluation.tasks.question_answering import read_items
from megatron_msa.evaluation.tasks.registry import Material
from megatron_msa.inference.limits import check_flags
from megatron_msa.inference.paged_rows import E4M3
from megatron_msa.inference.processes import process_groups

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser(
        "run", help="measure a checkpoint; goes on where an interrupted job was", allow_abbrev=False
    )
    _add_checkpoint(measure)
    _add_plan(measure)
    _add_engine(measure)
    collect = commands.add_parser(
        "collect", help="one report from the folders of several jobs over one checkpoint", allow_abbrev=False
    )
    collect.add_argument("folders", nargs="+", type=Path, help="--output of each job")
    collect.add_argument(
        "--incomplete",
        action="store_true",
        help="report what is there if a job has not begun or not ended; the report says so",
    )
    harness = commands.add_parser(
        "harness", help="tasks of EleutherAI's lm-evaluation-harness (package lm-eval)", allow_abbrev=False
    )
    _add_checkpoint(harness)
    _add_engine(harness)
    harness.add_argument("--tasks", nargs="+", required=True, help="names that the harness knows")
    harness.add_argument("--include-path", help="folder with task files of your own")
    harness.add_argument("--num-fewshot", type=int, help="default: the task's")
    harness.add_argument("--limit", type=int, help="documents per task; default: all")
    harness.add_argument("--attention", choices=ATTENTION_MODES, default="msa", help="default: %(default)s")
    harness.add_argument("--output", type=Path, required=True, help="folder for harness.json")
    harness.set_defaults(function=run_harness)
    for each in (measure, collect):
        each.add_argument("--output", type=Path, required=True, help="folder to write into")
        each.add_argument("--wandb-project", help="upload scores and pictures to this project")
        each.add_argument("--wandb-name", help="name of the W&B run; default: the checkpoint's")
    measure.set_defaults(function=run)
    collect.set_defaults(function=run_collect)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("checkpoint").add_argument
    add("--load", type=Path, required=True, help="folder of a run's checkpoints, saved under any layout")
    add("--ckpt-step", type=int, help="iteration to load; default: the latest")
    add("--tokenizer-type", help="default: the one that the checkpoint was trained with")
    add("--tokenizer-model", help="where the tokenizer lies now")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--tasks",
        nargs="+",
        default=["needle", "serving"],
        metavar="TASK",
        help=f"of {', '.join(MEASUREMENTS)}",
    )
    add("--lengths", nargs="+", type=int, required=True, help="tokens of prompt and reply together")
    add(
        "--depths",
        nargs="+",
        type=float,
        help="of the needle, 0 start to 1 end; default: --num-depths even ones",
    )
    add("--num-depths", type=int, default=11, help="default: %(default)s")
    add(
        "--attention",
        type=lambda text: [mode.strip() for mode in text.split(",")],
        default=["msa"],
        help=f"modes separated by commas, of {','.join(ATTENTION_MODES)}; dense is the control. Default: msa",
    )
    add("--samples", type=int, default=10, help="per cell; default: %(default)s")
    add("--seed", type=int, default=1234)
    add(
        "--style",
        choices=("instruct", "completion"),
        default="instruct",
        help="completion: no instructions, for small and base models. Default: %(default)s",
    )
    add(
        "--scoring",
        nargs="+",
        default=["generation"],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}: exact match in a generated reply, or the right answer ranked "
        "against wrong ones. Default: generation",
    )
    add(
        "--distractors",
        type=int,
        default=3,
        help="wrong answers per right one for log_probability; default: %(default)s",
    )
    add("--haystack", nargs="+", metavar="PATH", help="text files or folders; default: the built-in corpus")
    add("--qa-file", type=Path, help="JSON lines with context, question, answers for question_answering")
    add(
        "--quality-rows",
        type=int,
        default=256,
        help="query rows per layer and text for selection; default: %(default)s",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how to run it").add_argument
    add("--dtype", choices=_DTYPES, help="to compute in; default: on a GPU as trained, on a CPU fp32")
    add("--8bit-kv", dest="kv_8bit", action="store_true", help="keep keys and values in e4m3")
    add("--8bit-index-keys", dest="index_8bit", action="store_true", help="keep index keys in e4m3")
    add("--max-sequences", type=int, default=4, help="in the cache at a time; default: %(default)s")
    add("--prefill-chunk", type=int, default=8192, help="tokens of a forward pass; default: %(default)s")
    add("--position-limit", type=int, help="default: --max-position-embeddings of the checkpoint")
    add("--tensor-model-parallel-size", type=int, default=1, help="under torchrun; default: %(default)s")
    add("--context-parallel-size", type=int, default=1, help="shares the prefill; default: %(default)s")
    add("--expert-model-parallel-size", type=int, default=1, help="default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Measure what is not there yet, then report.

    Raises:
        ConfigError: options that do not fit each other, the checkpoint, or an earlier job's; an upload that
            failed, when everything else is written.
    """
    _check_upload(options)
    check_flags(options)
    plan = Plan(
        attention=options.attention,
        tasks=options.tasks,
        lengths=options.lengths,
        depths=evenly(options.num_depths) if options.depths is None else options.depths,
    )
    settings = Settings(samples=options.samples, seed=options.seed, methods=options.scoring)
    if options.distractors < 1:
        raise ConfigError(f"--distractors is {options.distractors}; it must be 1 or more")
    items = None if options.qa_file is None else read_items(options.qa_file)
    material = Material(
        haystack=read_haystack(options.haystack),
        style=options.style,
        distractors=options.distractors,
        items=items,
    )
    with _groups(options):
        checkpoint = _open(options, longest=max(plan.lengths), attention=plan.attention)
        header = {
            "settings": checkpoint.settings
            | {
                "samples": settings.samples,
                "seed": settings.seed,
                "methods": list(settings.methods),
                "style": material.style,
                "distractors": material.distractors,
                "haystack": material.haystack.fingerprint,
                "haystack_name": material.haystack.name,
                "questions": None if options.qa_file is None else _hash(options.qa_file),
            },
            "checkpoint": checkpoint.description,
            "versions": versions.describe(),
        }
        evaluate(plan, checkpoint.subject, material, settings, options.output, header)
        if _is_first():
            _report(options, *cell_file.merged([options.output]))


def run_collect(options: argparse.Namespace) -> None:
    """One report of several folders.

    Raises:
        ConfigError: folders that do not belong together; an upload that failed, when the report is written.
    """
    _check_upload(options)
    folders, incomplete = options.folders, []
    if options.incomplete:
        folders = [folder for folder in folders if cell_file.has_begun(folder)]
        for folder in options.folders:
            if not report.is_written(folder):
                reason = "its job has not ended" if folder in folders else "nothing is there yet"
                incomplete.append(f"{folder.name}: {reason}")
                print(f"not complete: {incomplete[-1]}", file=sys.stderr)
    header, results = cell_file.merged(folders)
    options.output.mkdir(parents=True, exist_ok=True)
    _report(options, header | {"incomplete": incomplete}, results)


def run_harness(options: argparse.Namespace) -> None:
    """The harness's own tasks.

    Raises:
        ConfigError: the package is not installed, or it knows no such task.
    """
    check_flags(options)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from megatron_msa.evaluation.harness import HarnessModel
    except ImportError as error:
        raise ConfigError(f"harness needs the package lm-eval ({error}): pip install lm-eval") from error
    manager = TaskManager(include_path=options.include_path)
    unknown = [task for task in options.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"the harness knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, "
            "and --include-path adds your own"
        )
    with _groups(options):
        limit = options.position_limit
        checkpoint = _open(options, longest=limit, attention=[options.attention])
        subject = checkpoint.subject
        found = simple_evaluate(
            model=HarnessModel(subject.model(options.attention), subject.tokens, subject.longest),
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
        )
        if _is_first():
            options.output.mkdir(parents=True, exist_ok=True)
            path = options.output / "harness.json"
            kept = {"attention": options.attention, "checkpoint": checkpoint.description}
            kept |= {"versions": versions.describe(), "results": found["results"]}
            path.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
            print(f"{json.dumps(found['results'], indent=1, default=str)}\nwrote {path}")


def _groups(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    return process_groups(
        tensor_parallel=options.tensor_model_parallel_size,
        context_parallel=options.context_parallel_size,
        expert_parallel=options.expert_model_parallel_size,
    )


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _open(options: argparse.Namespace, *, longest: int | None, attention: Sequence[str]) -> Checkpoint:
    return open_checkpoint(
        options.load,
        step=options.ckpt_step,
        dtype=_DTYPES.get(options.dtype),
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        options=EngineOptions(
            longest=longest,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            cache_dtype=E4M3 if options.kv_8bit else None,
            index_key_dtype=E4M3 if options.index_8bit else None,
            position_limit=options.position_limit,
        ),
        quality_rows=getattr(options, "quality_rows", 1),
        attention=attention,
    )


def _report(options: argparse.Namespace, header: dict[str, Any], results: report.Results) -> None:
    report.write(options.output, header, results)
    title = f"{header['checkpoint']['name']}, iteration {header['checkpoint']['iteration']:,}"
    methods = header["settings"]["methods"]
    files = plots.draw_all(options.output, results, title=title, methods=methods)
    for file in (options.output / "results.json", options.output / "report.md", *files):
        print(f"wrote {file}")
    if options.wandb_project is not None:
        wandb_upload.upload(
            results,
            files,
            header,
            project=options.wandb_project,
            name=options.wandb_name or title,
            methods=methods,
        )


def _check_upload(options: argparse.Namespace) -> None:
    if options.wandb_project is not None:
        wandb_upload.check_installed()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def main(description: str | None, argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what a user can correct, 130 or 143 for an interruption."""
    options = build_parser(description).parse_args(argv)
    # SIGTERM (a batch system's time limit) unwinds like Ctrl-C: the file of cells is closed, nothing is half
    # done.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options.function(options)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: start it again with the same command, finished cells are kept", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
