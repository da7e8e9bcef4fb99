"""Tokenizers as Megatron builds them, and the sidecar that ties a dataset to the one it was written with.

A `.bin` file holds bare token ids. `<prefix>.meta.json` beside it records the tokenizer, so that training
with another one is refused at the start instead of training on noise.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_msa.errors import ConfigError

if TYPE_CHECKING:
    from megatron.training.config import TokenizerConfig

META_FORMAT = 1

# Text that takes different tokenizers different ways: scripts, digits, code, whitespace, rare characters.
_PROBE = (
    "The quick brown fox, 1234567890 times 3.14; it's naïve.\n\n\tdef step(x: int) -> None:\n        return "
    "x ** 2\nGröße, déjà vu, Привет мир, 你好世界, こんにちは, مرحبا, 🙂 internationalization    end"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """What `<prefix>.meta.json` holds."""

    documents: int
    tokens: int
    dtype: str
    """numpy name of the token type in the .bin file: uint16 or int32."""
    append_eod: bool
    tokenizer: dict[str, Any]
    """Megatron's tokenizer settings that differ from their defaults (tokenizer_type, tokenizer_model,
    ...)."""
    vocab_size: int
    eod: int | None
    fingerprint: str
    """See `tokenizer_fingerprint`."""
    format: int = META_FORMAT

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, prefix: str) -> "DatasetMeta | None":
        """Read the sidecar of the dataset at `prefix`; None where there is none (data written by other
        tools)."""
        path = meta_path(prefix)
        if not path.exists():
            return None
        try:
            meta = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}). Write the dataset again, or delete this file."
            ) from error
        if meta.format != META_FORMAT:
            raise ConfigError(f"{path} has format {meta.format}; this version reads format {META_FORMAT}.")
        return meta


def meta_path(prefix: str) -> Path:
    """The sidecar's path for a dataset prefix."""
    return Path(prefix + ".meta.json")


def tokenizer_config_from_args(args: Any) -> "TokenizerConfig":
    """Megatron's tokenizer settings out of parsed arguments (training's or the preprocessor's)."""
    # Imported late: the entry may have to prepare a machine without a GPU before megatron.training loads.
    from megatron.training.config import TokenizerConfig

    names = [field.name for field in dataclasses.fields(TokenizerConfig) if hasattr(args, field.name)]
    return TokenizerConfig(**{name: getattr(args, name) for name in names})


def tokenizer_settings(config: "TokenizerConfig") -> dict[str, Any]:
    """The settings of `config` that differ from Megatron's defaults and say how text becomes ids."""
    defaults = type(config)()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("padded_vocab_size", "pad_vocab_size")
        and getattr(config, field.name) != getattr(defaults, field.name)
    }


def load_tokenizer(config: "TokenizerConfig") -> Any:
    """Build the tokenizer with Megatron's own `build_tokenizer`, so that ids are what training will see.

    Raises:
        ConfigError: no such directory, or a tokenizer that Megatron cannot build.
    """
    model = config.tokenizer_model
    if model is not None and _must_be_local(model) and not Path(model).exists():
        raise ConfigError(
            f"tokenizer {model} does not exist: --tokenizer-model takes a local directory or a hub name."
        )
    # The padded size depends on the model's layout, which is none of the data's business.
    unpadded = dataclasses.replace(config, pad_vocab_size=False)
    try:
        return build_tokenizer(unpadded)
    except (ValueError, OSError, AssertionError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"cannot build the tokenizer --tokenizer-type {config.tokenizer_type} --tokenizer-model {model}: "
            f"{error}"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what the tokenizer does: vocabulary size, end-of-document id and the ids of a fixed text.

    Paths are left out: the same tokenizer may lie elsewhere on another machine.
    """
    try:
        ids = [int(token) for token in tokenizer.tokenize(_PROBE)]
    except (ValueError, NotImplementedError):  # Megatron's NullTokenizer takes numbers only
        ids = []
    content = json.dumps([tokenizer.vocab_size, tokenizer.eod, ids])
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _must_be_local(model: str) -> bool:
    """Whether `model` can only be meant as a path: a hub name is NAME or OWNER/NAME."""
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        return True
    return "/" in model and Path(model).parent.is_dir()
