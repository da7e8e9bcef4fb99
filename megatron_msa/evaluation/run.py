"""Works through the cells of a plan and keeps what is finished."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import perplexity, questions
from megatron_msa.evaluation.cell_file import CellFile
from megatron_msa.evaluation.fitting import DoesNotFit
from megatron_msa.evaluation.plan import PERPLEXITY, SELECTION, SERVING, Cell, Plan
from megatron_msa.evaluation.protocol import LanguageModel, Tokens
from megatron_msa.evaluation.scoring import METHODS
from megatron_msa.evaluation.tasks.registry import TASK_NAMES, Material, make_task


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: by attention mode. Called once per mode, when its first cell comes up.
        tokens: of the model.
        longest: tokens that the model takes.
        serving: costs at a length, for JSON.
        selection: measures the block selection on texts, or says why that is not possible.
    """

    model: Callable[[str], LanguageModel]
    tokens: Tokens
    longest: int
    serving: Callable[[int], dict[str, Any]]
    selection: Callable[[Sequence[Sequence[int]]], dict[str, Any]] | str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How cells are measured.

    Attributes:
        samples: per cell.
        seed: of all samples.
        methods: of scoring.
    """

    samples: int
    seed: int
    methods: Sequence[str]

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples is {self.samples}; it must be 1 or more")
        for method in self.methods or [""]:
            if method not in METHODS:
                raise ConfigError(f"--scoring has {method!r}; there are {', '.join(METHODS)}")


def check(plan: Plan, subject: Subject, material: Material, settings: Settings) -> dict[tuple[str, int], str]:
    """Refuse, before any work, what cannot be measured.

    Returns:
        (task, length) -> why it is left out: every sample of a cell must fit into its length, and there must
        be text enough to fill it.

    Raises:
        ConfigError: a length over the model's limit, a task that lacks its material, a selection that cannot
            be measured, or nothing that fits.
    """
    longest = max(plan.lengths)
    if longest > subject.longest:
        raise ConfigError(
            f"--lengths has {longest:,}, but the model takes {subject.longest:,} tokens "
            "(--max-position-embeddings of the checkpoint); leave the longer ones out, or raise "
            "--position-limit to read the rotary embedding beyond what it was trained for"
        )
    if SELECTION in plan.tasks and isinstance(subject.selection, str):
        raise ConfigError(f"--tasks has {SELECTION}, but {subject.selection}")
    left_out: dict[tuple[str, int], str] = {}
    cells = plan.cells()
    for cell in dict.fromkeys(replace(cell, attention=plan.attention[0]) for cell in cells):
        if (cell.task, cell.length) not in left_out:
            try:
                _check_fits(cell, subject.tokens, material, settings)
            except DoesNotFit as reason:
                left_out[cell.task, cell.length] = str(reason)
    if all((cell.task, cell.length) in left_out for cell in cells):
        raise ConfigError("; ".join(left_out.values()) or "--tasks and --attention leave nothing to measure")
    return left_out


def _check_fits(cell: Cell, tokens: Tokens, material: Material, settings: Settings) -> None:
    if cell.task in TASK_NAMES:
        task = make_task(cell.task, material)
        questions.check_samples(task, tokens, cell, samples=settings.samples, seed=settings.seed)
    elif cell.task == PERPLEXITY and cell.length < 2:
        raise DoesNotFit(
            f"{PERPLEXITY} takes 2 tokens, because nothing stands before the first, but the length is "
            f"{cell.length}: use longer ones, or leave it out"
        )
    elif cell.task in (PERPLEXITY, SELECTION):
        perplexity.texts(material.haystack, tokens, length=cell.length, samples=1, seed=settings.seed)


def evaluate(
    plan: Plan,
    subject: Subject,
    material: Material,
    settings: Settings,
    folder: Path,
    header: dict[str, Any],
    *,
    show_progress: bool = True,
) -> None:
    """Measure every cell of the plan that the folder does not have yet.

    Cells that do not fit are kept, too, as "skipped": the reason.

    With several processes all of them call it; the first one writes.

    Args:
        plan: which cells.
        subject: what is evaluated.
        material: texts and wording of the tasks.
        settings: how.
        folder: for the file of finished cells.
        header: first line of that file, with all "settings".
        show_progress: a bar on stderr.

    Raises:
        ConfigError: see `check`, `cell_file.CellFile` and the tasks.
    """
    left_out = check(plan, subject, material, settings)
    cells = plan.cells()
    with _Results(folder, header) as results:
        if results.is_writer:
            for (task, length), reason in left_out.items():
                print(f"left out: {task} at {length:,}: {reason}", file=sys.stderr)
        todo = [cell for cell in cells if cell not in results.done]
        # In a log file every refresh is a new line: two a minute are enough there.
        refresh_seconds = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=len(cells),
            initial=len(cells) - len(todo),
            unit="cell",
            desc="evaluate",
            mininterval=refresh_seconds,
            disable=not (show_progress and results.is_writer),
        ) as bar:
            models: dict[str, LanguageModel] = {}
            for cell in todo:
                if (cell.task, cell.length) in left_out:
                    results.add(cell, {"skipped": left_out[cell.task, cell.length]})
                    bar.update()
                    continue
                bar.set_postfix_str(f"{cell.attention} {cell.task} at {cell.length:,}", refresh=False)
                if cell.task != SERVING and cell.attention not in models:
                    models.clear()  # one cache at a time
                    models[cell.attention] = subject.model(cell.attention)
                started = time.perf_counter()
                result = _measure(cell, models.get(cell.attention), subject, material, settings)
                _check_finite(cell, result)
                results.add(cell, result | {"seconds": round(time.perf_counter() - started, 3)})
                bar.update()


def _measure(
    cell: Cell, model: LanguageModel | None, subject: Subject, material: Material, settings: Settings
) -> dict[str, Any]:
    if cell.task == SERVING:
        return subject.serving(cell.length)
    assert model is not None
    common = {"samples": settings.samples, "seed": settings.seed}
    if cell.task in (PERPLEXITY, SELECTION):
        texts = perplexity.texts(material.haystack, subject.tokens, length=cell.length, **common)
        if cell.task == PERPLEXITY:
            return perplexity.measure(model, texts)
        assert not isinstance(subject.selection, str)
        return subject.selection(texts)
    fitted = questions.fitted_samples(make_task(cell.task, material), subject.tokens, cell, **common)
    return questions.measure(model, subject.tokens, fitted, methods=settings.methods)


def _check_finite(cell: Cell, result: dict[str, Any]) -> None:
    try:
        json.dumps(result, allow_nan=False)
    except ValueError as error:
        depth = "" if cell.depth is None else f", depth {cell.depth:.0%}"
        raise ConfigError(
            f"the model gives NaN or infinity: {cell.task} at {cell.length:,} tokens{depth}, --attention "
            f"{cell.attention}; look at the checkpoint's weights, or compute in another --dtype. Finished "
            "cells are kept"
        ) from error


class _Results:
    """The file of cells for all processes: the first one has it, the others hear what is done."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.is_writer = _rank() == 0
        self._file: CellFile | None = None
        done: Iterable[Cell] | str = ()
        if self.is_writer:
            try:
                self._file = CellFile(folder, header)
                done = list(self._file.results)
            except ConfigError as error:
                done = str(error)
        done = _from_first(done)
        if isinstance(done, str):  # on every process, so that none waits for one that has ended
            raise ConfigError(done)
        self.done = frozenset(done)

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.add(cell, result)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _from_first(value: Any) -> Any:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
