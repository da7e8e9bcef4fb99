"""What results depend on besides settings: versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """For the header of a file of results."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = {name: _version(name) for name in ("torch", "triton", "megatron-core", "transformers")}
    return {"device": device, "python": platform.python_version(), **packages, "commit": _commit()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Short hash, with "+changes" where files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
