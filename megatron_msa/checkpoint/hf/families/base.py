"""A family of Hugging Face models: its mapping table and its configuration in Megatron's terms.

Every configuration entry is read in both directions. What a family requires of Megatron's settings is also
how the family of a Megatron checkpoint is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_msa.checkpoint.hf.mapping import Rule
from megatron_msa.checkpoint.hf.settings import Settings, complete
from megatron_msa.errors import ConfigError


@dataclass(frozen=True)
class Same:
    """A field that means the same on both sides."""

    hf: str
    megatron: str


@dataclass(frozen=True)
class Requires:
    """A field of the Hugging Face configuration that must have this value, because Megatron has no other.

    A configuration without the field is accepted.
    """

    hf: str
    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Computed:
    """A group of fields translated by two functions.

    Attributes:
        to_megatron: configuration -> settings; raises ConfigError for what cannot be expressed.
        to_hf: settings -> fields of the configuration; raises ConfigError likewise.
    """

    to_megatron: Callable[[Any], Settings]
    to_hf: Callable[[Settings], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """See the module."""

    name: str
    architecture: str
    """The class in config.json's ``architectures``."""
    model_type: str
    """``model_type`` in config.json: chooses the family of an import."""
    rules: tuple[Rule, ...]
    constants: Settings
    """What all models of the family share, in Megatron's terms."""
    translations: tuple[Same | Requires | Computed, ...]
    ignored: tuple[str, ...] = ()
    """Patterns of Hugging Face tensors that are no parameters, such as rotary frequencies in old files."""
    free: tuple[str, ...] = ("layernorm_zero_centered_gamma", "msa_schedule")
    """Constants in which a Megatron model of the family may differ: `gain` converts the first."""
    text_config: bool = False
    """The language model's settings are in ``text_config`` of a multimodal configuration."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements that turn other names of the same tensors into the table's."""
    serving_fields: Callable[[Settings], dict[str, Any]] | None = None
    """Fields that are added to an exported configuration for programs other than transformers."""
    copied_from_source: str | None = None
    """Pattern of tensors that a text model lacks: on export they come from the source folder."""
    vision: Computed | None = None
    """Translates the vision part of the whole configuration, in families that have one."""

    @property
    def zero_centered_gains(self) -> bool:
        return bool(self.constants["layernorm_zero_centered_gamma"])

    def spelled(self, name: str) -> str:
        """The table's name of a Hugging Face tensor."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def language_config(self, config: Any) -> Any:
        """The part of a configuration that describes the language model."""
        return config.text_config if self.text_config else config

    def to_settings(self, config: Any, padded_vocab_size: int) -> Settings:
        """Megatron's settings of a transformers configuration.

        Raises:
            ConfigError: something that Megatron cannot compute.
        """
        settings: Settings = dict(self.constants)
        if self.vision is not None:
            settings |= self.vision.to_megatron(config)
        config = self.language_config(config)
        for entry in self.translations:
            if isinstance(entry, Same):
                settings[entry.megatron] = getattr(config, entry.hf)
            elif isinstance(entry, Requires):
                value = getattr(config, entry.hf, entry.values[0])
                if value not in entry.values:
                    allowed = " or ".join(map(repr, entry.values))
                    raise ConfigError(
                        f"config.json has {entry.hf} = {value!r}; only {allowed} converts: {entry.why}"
                    )
            else:
                settings |= entry.to_megatron(config)
        settings["padded_vocab_size"] = padded_vocab_size
        return complete(settings)

    def misfits(self, settings: Settings) -> list[str]:
        """Why a Megatron model with these settings is none of this family; empty if it is one."""
        fixed = {name: value for name, value in self.constants.items() if name not in self.free}
        reasons = [
            f"{name} is {settings[name]!r}, not {value!r}"
            for name, value in fixed.items()
            if settings[name] != value
        ]
        if "num_experts" not in self.constants and not settings["num_experts"]:
            reasons.append("it has no experts")
        if self.vision is None and settings["vision_mode"] != "none":
            reasons.append("it has a vision part")
        if not reasons:
            try:
                self.hf_fields(settings)
            except ConfigError as error:
                reasons.append(str(error))
        return reasons

    def hf_fields(self, settings: Settings) -> dict[str, Any]:
        """Fields of the Hugging Face configuration, without the vocabulary size.

        Raises:
            ConfigError: a setting that the family cannot express.
        """
        fields: dict[str, Any] = {}
        for entry in self.translations:
            if isinstance(entry, Same):
                fields[entry.hf] = settings[entry.megatron]
            elif isinstance(entry, Computed):
                fields |= entry.to_hf(settings)
        return fields
