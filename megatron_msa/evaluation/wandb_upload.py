"""Scores and pictures to Weights & Biases, when asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.report import Results, by_length, mean_score


def scalars(results: Results, methods: Sequence[str]) -> dict[str, float]:
    """One number per method, task, attention and length."""
    found = {}
    values: dict[str, Any] = {method: partial(mean_score, method=method) for method in methods}
    values |= {name: methodcaller("get", name) for name in ("mean_loss", "block_recall", "score_recall")}
    for name, value in values.items():
        for (attention, task), row in by_length(results, value).items():
            for length, number in row.items():
                found[f"{name}/{task}/{attention}/{length}"] = number
    return found


def check_installed() -> None:
    """Refuse an upload before there is anything to upload.

    Raises:
        ConfigError: wandb is not installed.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError("--wandb-project needs wandb: pip install wandb, or leave it out") from error


def upload(
    results: Results,
    files: Sequence[Path],
    header: dict[str, Any],
    *,
    project: str,
    name: str,
    methods: Sequence[str],
) -> None:
    """Log scalars, pictures and settings as one run.

    Raises:
        ConfigError: wandb is not installed, or it refuses.
    """
    check_installed()
    import wandb

    config = {key: header[key] for key in ("settings", "checkpoint", "versions")}
    try:
        with wandb.init(project=project, name=name, config=config, job_type="long-context evaluation") as run:
            pictures = {file.stem: wandb.Image(str(file)) for file in files}
            run.log(scalars(results, methods) | pictures, step=header["checkpoint"]["iteration"])
    except wandb.errors.Error as error:
        raise ConfigError(
            f"--wandb-project {project}: the upload failed ({' '.join(str(error).split())}). The results are "
            "written; `wandb login`, or upload them later with `collect`"
        ) from error
