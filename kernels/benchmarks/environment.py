"""What a figure depends on besides the code: hardware, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path

import torch


def describe(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Columns of every row. ``commit`` is for copies of the repository without its history."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none (CPU)",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if on_gpu
        else "",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "",
        "commit": commit or commit_of_repository(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version_of(package: str) -> str:
    """Of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit_of_repository() -> str:
    """Short hash, with "+changes" where files differ from it; "unknown" outside a repository."""
    folder = str(Path(__file__).parent)
    commit = _output(["git", "-C", folder, "rev-parse", "--short", "HEAD"])
    if commit == "unknown":
        return commit
    changes = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changes not in ("", "unknown") else "")


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.split("\n")[0].strip()
