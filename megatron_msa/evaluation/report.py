"""results.json and report.md: every cell with its settings, and tables by length."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from megatron_msa.evaluation.plan import PERPLEXITY, SERVING, Cell
from megatron_msa.evaluation.scoring import LOG_PROBABILITY
from megatron_msa.evaluation.tasks.registry import TASK_NAMES

Results = dict[Cell, dict[str, Any]]

_RESULTS = "results.json"


def mean_score(result: dict[str, Any], method: str) -> float | None:
    """Of a cell's samples; None if it was not scored that way."""
    scores = result.get("scores", {}).get(method)
    return sum(scores) / len(scores) if scores else None


def by_length(
    results: Results, value: Callable[[dict[str, Any]], float | None]
) -> dict[tuple[str, str], dict[int, float]]:
    """(attention, task) -> length -> mean over depths of ``value``; results without one are left out."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in results.items():
        number = value(result)
        if number is not None:
            found[cell.attention, cell.task][cell.length].append(number)
    return {
        row: {length: sum(values) / len(values) for length, values in sorted(columns.items())}
        for row, columns in found.items()
    }


def is_written(folder: Path) -> bool:
    """Whether a job has got as far as its report."""
    return (folder / _RESULTS).is_file()


def write(folder: Path, header: dict[str, Any], results: Results) -> None:
    """Write results.json and report.md, each whole or not at all."""
    cells = [
        {**cell.as_json(), **_with_means(results[cell])}
        for cell in sorted(
            results, key=lambda cell: (cell.attention, cell.task, cell.length, cell.depth or 0)
        )
    ]
    _replace(folder / _RESULTS, json.dumps({**header, "cells": cells}, indent=1) + "\n")
    _replace(folder / "report.md", markdown(header, results))


def _with_means(result: dict[str, Any]) -> dict[str, Any]:
    methods = result.get("scores", {})
    return (
        result | {"mean_scores": {name: mean_score(result, name) for name in methods}} if methods else result
    )


def markdown(header: dict[str, Any], results: Results) -> str:
    """The report as text; header["incomplete"] says which jobs are not whole in it."""
    settings, checkpoint = header["settings"], header["checkpoint"]
    parts = [f"# Long-context evaluation of {checkpoint['name']}, iteration {checkpoint['iteration']:,}"]
    parts.append(
        f"{settings['samples']} samples per cell, seed {settings['seed']}, {settings['style']} prompts, "
        f"haystack: {settings['haystack_name']}. {_provenance(header['versions'])}"
    )
    if header.get("incomplete"):
        parts.append(f"**Not complete:** {'; '.join(header['incomplete'])}.")
    for method in settings["methods"]:
        rows = by_length(results, partial(mean_score, method=method))
        if rows:
            text = f"## Score by length ({method.replace('_', ' ')})\n\n"
            text += "Mean over samples and depths; 1 is best."
            if method == LOG_PROBABILITY:
                text += f" Guessing gives {_chances(results)}."
            parts.append(f"{text}\n\n{_score_table(rows, TASK_NAMES)}")
    losses = by_length(results, methodcaller("get", "mean_loss"))
    if losses:
        parts.append(
            "## Loss by length\n\nNats per token over the whole text; by position: results.json and "
            f"perplexity_by_position.png.\n\n{_score_table(losses, [PERPLEXITY], digits=4)}"
        )
    recalls = {
        ("msa", name.replace("_", " ")): row
        for name in ("block_recall", "score_recall")
        for row in by_length(results, methodcaller("get", name)).values()
    }
    if recalls:
        parts.append(
            "## Selection against full attention\n\nMean over layers, rows that see more than k blocks.\n\n"
            + _table("recall", recalls, [name for _, name in recalls])
        )
    serving = {cell.length: result for cell, result in results.items() if cell.task == SERVING}
    if serving:
        parts.append(_serving([serving[length] for length in sorted(serving)]))
    skipped = {
        (cell.task, cell.length): each["skipped"] for cell, each in results.items() if "skipped" in each
    }
    if skipped:
        lines = [f"- {task} at {length:,}: {reason}" for (task, length), reason in sorted(skipped.items())]
        parts.append("## Left out\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _provenance(versions: dict[str, str]) -> str:
    device, commit = versions["device"], versions["commit"]
    return f"Measured on {device}, commit {commit}, torch {versions['torch']}, triton {versions['triton']}."


def _chances(results: Results) -> str:
    found = {cell.task: result["chance"] for cell, result in results.items() if "chance" in result}
    return ", ".join(f"{chance:.3f} ({task})" for task, chance in sorted(found.items()))


def _score_table(
    rows: dict[tuple[str, str], dict[int, float]], tasks: Iterable[str], *, digits: int = 3
) -> str:
    return _table("task", rows, tasks, digits=digits)


def _table(
    first: str, rows: dict[tuple[str, str], dict[int, float]], names: Iterable[str], *, digits: int = 3
) -> str:
    """One row per name and attention, one column per length."""
    lengths = sorted({length for row in rows.values() for length in row})
    lines = [[first, "attention", *(f"{length:,}" for length in lengths)]]
    for name in dict.fromkeys(names):
        for attention in ("msa", "dense"):
            row = rows.get((attention, name))
            if row:
                cells = (f"{row[length]:.{digits}f}" if length in row else "-" for length in lengths)
                lines.append([name.replace("_", " "), attention, *cells])
    return _lines(lines)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _serving(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            "tokens",
            "prefill TFLOP",
            "dense",
            "ratio",
            "decode GFLOP",
            "dense",
            "ratio",
            "cache read MiB",
            "dense",
            "ratio",
        ]
    ]
    for each in (result["cost"] for result in results):
        prefill, decode = each["prefill"], each["decode"]
        read, dense_read = each["bytes_read_sparse"], each["bytes_read_dense"]
        row = [f"{each['length']:,}"]
        for executed, dense, unit in (
            (prefill["executed"], prefill["dense"], 1e12),
            (decode["executed"], decode["dense"], 1e9),
            (read, dense_read, 2**20),
        ):
            row += [f"{executed / unit:.4g}", f"{dense / unit:.4g}", f"{dense / executed:.2f}x"]
        rows.append(row)
    cache = [["dtype", "keys and values", "index keys"]]
    for name, parts in results[0]["cache_bytes_per_token"].items():
        cache.append([name, f"{parts['key_value']:,}", f"{parts['index_key']:,}"])
    return (
        "## Serving\n\nBy arithmetic, for one sequence and the whole model: FLOPs of reading so many tokens "
        "and of the last one, and what that one reads of a bf16 cache, against the same model with full "
        "attention.\n\n"
        f"{_lines(rows)}\n\nBytes of the cache per token, all layers:\n\n{_lines(cache)}"
    )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
