"""What belongs to a Hugging Face model beside its weights: config.json, generation settings, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_msa.errors import ConfigError

FOLDER = "hf"
"""In a converted checkpoint: where these files are kept for the way back."""
CONFIG_NAME = "config.json"
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
    "*.model",
)
_OTHER_PATTERNS = ("generation_config.json", "*processor_config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ConfigError: missing or not JSON.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it is needed to convert a model") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return config


def load_config(folder: Path) -> Any:
    """The same as transformers understands it: old field names translated, defaults filled in.

    Raises:
        ConfigError: transformers refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"transformers cannot read {folder / CONFIG_NAME}: {message[:300]}") from error


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and generation settings; returns the names of the tokenizer's files."""
    tokenizer = _copy(source, target, _TOKENIZER_PATTERNS)
    _copy(source, target, _OTHER_PATTERNS)
    return tokenizer


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    names = {path.name for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)
    return sorted(names)
