"""The families of Hugging Face models that can be converted."""

from __future__ import annotations

from typing import Any

from megatron_msa.checkpoint.hf.families.base import Family
from megatron_msa.checkpoint.hf.families.llama import LLAMA
from megatron_msa.checkpoint.hf.families.minimax_m2 import MINIMAX_M2
from megatron_msa.checkpoint.hf.families.minimax_m3 import MINIMAX_M3, MINIMAX_M3_TEXT
from megatron_msa.checkpoint.hf.families.qwen3 import QWEN3
from megatron_msa.checkpoint.hf.families.qwen3_moe import QWEN3_MOE
from megatron_msa.checkpoint.hf.settings import Settings
from megatron_msa.errors import ConfigError

FAMILIES = (LLAMA, QWEN3, QWEN3_MOE, MINIMAX_M2, MINIMAX_M3_TEXT, MINIMAX_M3)


def known() -> str:
    """The architectures, for messages."""
    return ", ".join(family.architecture for family in FAMILIES)


def by_config(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: none of the known ones.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures:
            return family
    if not architectures:
        for family in FAMILIES:
            if family.model_type == config.get("model_type"):
                return family
    shown = ", ".join(architectures) or f"model_type {config.get('model_type')!r}"
    raise ConfigError(f"{where} describes {shown}, which cannot be converted; known are {known()}")


def by_settings(settings: Settings, architecture: str | None) -> Family:
    """The family that a Megatron model is exported to: the one asked for, or the only one that fits.

    Raises:
        ConfigError: unknown architecture, or the model does not fit; says where it differs.
    """
    if architecture is not None:
        for family in FAMILIES:
            if family.architecture == architecture:
                misfits = family.misfits(settings)
                if misfits:
                    raise ConfigError(f"the model cannot be exported as {architecture}: {'; '.join(misfits)}")
                return family
        raise ConfigError(f"--architecture {architecture} is unknown; known are {known()}")
    reasons = {}
    for family in FAMILIES:
        misfits = family.misfits(settings)
        if not misfits:
            return family
        reasons[family.architecture] = misfits
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise ConfigError(
        f"the model fits no Hugging Face family; nearest is {nearest}, where {'; '.join(reasons[nearest])}"
    )
