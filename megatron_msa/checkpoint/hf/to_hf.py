"""Megatron -> Hugging Face: a distributed checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_msa.checkpoint.hf import sidecar
from megatron_msa.checkpoint.hf.command import add_common_arguments, is_allowed, refuse
from megatron_msa.checkpoint.hf.families import by_config, by_settings
from megatron_msa.checkpoint.hf.families.base import Family
from megatron_msa.checkpoint.hf.mapping import Mapped, map_names
from megatron_msa.checkpoint.hf.megatron_model import Blueprint, blueprint
from megatron_msa.checkpoint.hf.report import Report
from megatron_msa.checkpoint.hf.safetensors_files import SafetensorsReader, SafetensorsWriter, TensorInfo
from megatron_msa.checkpoint.hf.settings import NO_VISION, Settings, from_arguments
from megatron_msa.checkpoint.hf.target import new_folder
from megatron_msa.checkpoint.hf.torch_dist import DistributedCheckpoint
from megatron_msa.checkpoint.hf.transforms import Geometry
from megatron_msa.checkpoint.inspection import find_checkpoint
from megatron_msa.errors import ConfigError

_EMBEDDING = "embedding.word_embeddings.weight"
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.", "vision")
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}


def add_subcommand(subparsers: Any) -> None:
    """Register ``megatron-to-hf``."""
    parser = subparsers.add_parser(
        "megatron-to-hf",
        help="a Megatron distributed checkpoint to a Hugging Face model (safetensors)",
        description=__doc__,
    )
    add_common_arguments(parser)
    parser.add_argument("--load", type=Path, required=True, help="As --load of training.")
    parser.add_argument("--ckpt-step", type=int, help="Iteration; default: the latest.")
    parser.add_argument(
        "--hf-source",
        type=Path,
        help="Folder whose configuration, tokenizer and (multimodal layout) vision tensors the result gets. "
        "Default: the folder hf in --load, which a conversion to Megatron leaves there.",
    )
    parser.add_argument(
        "--architecture", help="Class to export to. Default: that of --hf-source, or what the model fits."
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="Rows of the vocabulary without Megatron's padding. Default: that of --hf-source, or all rows.",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="Such as 500MB. Default: %(default)s.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The command."""
    report = convert(
        args.load,
        args.save,
        step=args.ckpt_step,
        hf_source=args.hf_source,
        architecture=args.architecture,
        vocab_size=args.vocab_size,
        max_shard_bytes=parse_size(args.max_shard_size),
        allow_extra=args.allow_extra,
    )
    print(report.describe())
    if args.verify:
        from megatron_msa.checkpoint.hf.verify import verify

        print(report.verification_memory())
        print(verify(args.save, Path(report.source), num_tokens=args.verify_tokens))


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``20KB`` or a plain number."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size is {text!r}; write a size such as 5GB or 500MB")
    return int(match[1]) * _SIZES[match[2]]


def convert(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    hf_source: Path | None = None,
    architecture: str | None = None,
    vocab_size: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    allow_extra: list[str] | None = None,
) -> Report:
    """Export the checkpoint in ``source`` (as --load of training) to the folder ``target``.

    Memory: one tensor of Megatron's model and, for the multimodal layout, one vision tensor at a time.

    Raises:
        ConfigError: a checkpoint that cannot be exported, or a target that cannot be written.
    """
    plan = _plan(source, step, hf_source, architecture, vocab_size)
    report = Report("megatron-to-hf", plan.family.name, str(plan.checkpoint.folder), str(target))
    report.padding_rows = plan.geometry.padded_vocab_size - plan.geometry.vocab_size
    _match(plan, report, allow_extra or [])
    tensors = {name: output.info for name, output in plan.outputs.items()}
    copied = _copied_tensors(plan)
    if copied is not None:
        report.copied = {name: list(info.shape) for name, info in copied[1].items()}
        tensors |= copied[1]
    config = _config_text(plan)
    expected = sum(info.nbytes for info in tensors.values())
    with new_folder(target, expected_bytes=expected) as folder:

        def load(name: str) -> Iterator[Tensor]:
            if name in plan.outputs:
                yield from plan.outputs[name].pieces(plan)
            else:
                assert copied is not None
                yield copied[0].read(name)

        SafetensorsWriter(folder, tensors, max_shard_bytes).write(load)
        if plan.hf_source is not None:
            sidecar.copy_companions(plan.hf_source, folder)
        (folder / sidecar.CONFIG_NAME).write_text(config, encoding="utf-8")
        report.write(folder)
    return report


class _Output(NamedTuple):
    """A Hugging Face tensor and the Megatron tensors that it comes from, in the order of its bytes."""

    info: TensorInfo
    origins: list[tuple[str, int]]
    """Megatron name, and which of its parts."""

    def pieces(self, plan: _Plan) -> Iterator[Tensor]:
        for name, number in self.origins:
            yield plan.latest.parts(plan, name)[number]


class _Latest:
    """The parts of the tensor converted last: q, k and v come from one."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._parts: list[Tensor] = []

    def parts(self, plan: _Plan, name: str) -> list[Tensor]:
        if name != self._name:
            self._parts = []  # frees the previous one before the next is read
            pieces = plan.blueprint.pieces[name]
            read = [
                plan.checkpoint.read(piece.key, piece.offset, piece.chunk_shape).reshape(piece.shape)
                for piece in pieces
            ]
            whole = read[0] if len(read) == 1 else torch.cat(read)
            self._parts = plan.mapped[name].rule.functions.to_hf(whole, plan.geometry)
            self._name = name
        return self._parts


class _Plan(NamedTuple):
    checkpoint: DistributedCheckpoint
    family: Family
    settings: Settings
    geometry: Geometry
    blueprint: Blueprint
    mapped: dict[str, Mapped]
    outputs: dict[str, _Output]
    hf_source: Path | None
    latest: _Latest


def _plan(
    source: Path,
    step: int | None,
    hf_source: Path | None,
    architecture: str | None,
    vocab_size: int | None,
) -> _Plan:
    folder = find_checkpoint(str(source), step)
    if folder is None:
        raise ConfigError(f"--load {source} has no checkpoint (no latest_checkpointed_iteration.txt)")
    checkpoint = DistributedCheckpoint(folder)
    if "args" not in checkpoint.common_state:
        raise ConfigError(f"{folder} has no saved arguments, which say what model it is")
    settings = from_arguments(checkpoint.common_state["args"])
    if _EMBEDDING not in checkpoint.shapes:
        raise ConfigError(f"{folder} has no {_EMBEDDING}: it is not a checkpoint of a language model")
    padded = checkpoint.shapes[_EMBEDDING][0]
    settings["padded_vocab_size"] = padded
    if hf_source is None and (source / sidecar.FOLDER / sidecar.CONFIG_NAME).is_file():
        hf_source = source / sidecar.FOLDER
    family, vocab_size = _family_and_vocabulary(settings, hf_source, architecture, vocab_size)
    if not 0 < vocab_size <= padded:
        raise ConfigError(
            f"the vocabulary is to have {vocab_size} rows, the checkpoint {folder} has {padded}"
        )
    dtype = checkpoint.dtypes[_EMBEDDING]
    bp = blueprint(settings, dtype, checkpoint.common_state.get("content_metadata"))
    centred = settings["layernorm_zero_centered_gamma"]
    geometry = Geometry.of(settings, vocab_size, gain_shift=family.zero_centered_gains - centred)
    mapped = map_names(family.rules, bp.shapes, family.name)
    outputs = _outputs(checkpoint, bp, mapped, geometry)
    return _Plan(checkpoint, family, settings, geometry, bp, mapped, outputs, hf_source, _Latest())


def _family_and_vocabulary(
    settings: Settings, hf_source: Path | None, architecture: str | None, vocab_size: int | None
) -> tuple[Family, int]:
    if hf_source is not None:
        raw = sidecar.read_config(hf_source)
        source_family = by_config(raw, str(hf_source / sidecar.CONFIG_NAME))
        architecture = architecture or source_family.architecture
        if vocab_size is None:
            vocab_size = source_family.language_config(sidecar.load_config(hf_source)).vocab_size
    if vocab_size is None:
        vocab_size = settings["padded_vocab_size"]
    return by_settings(settings, architecture), vocab_size


def _outputs(
    checkpoint: DistributedCheckpoint, bp: Blueprint, mapped: dict[str, Mapped], geometry: Geometry
) -> dict[str, _Output]:
    """Every Hugging Face tensor with its shape, in the order of Megatron's."""
    infos: dict[str, TensorInfo] = {}
    origins: dict[str, dict[int, tuple[str, int]]] = {}
    for name, (rule, parts) in mapped.items():
        key = bp.pieces[name][0].key
        dtype = checkpoint.dtypes.get(key, bp.dtypes[name])
        converted = rule.functions.to_hf(torch.empty(bp.shapes[name], device="meta", dtype=dtype), geometry)
        for number, (part, tensor) in enumerate(zip(parts, converted, strict=True)):
            stacked = origins.setdefault(part.name, {})
            stacked[part.entry or 0] = (name, number)
            shape = tuple(tensor.shape) if part.entry is None else (len(stacked), *tensor.shape)
            infos[part.name] = TensorInfo(shape, tensor.dtype)
    return {
        name: _Output(info, [origins[name][index] for index in sorted(origins[name])])
        for name, info in infos.items()
    }


def _match(plan: _Plan, report: Report, allow_extra: list[str]) -> None:
    """Compare what the checkpoint holds with what its arguments say."""
    shapes, folder = plan.checkpoint.shapes, plan.checkpoint.folder
    keys = {piece.key: piece.global_shape for pieces in plan.blueprint.pieces.values() for piece in pieces}
    refuse(
        {key: list(shape) for key, shape in keys.items() if key not in shapes},
        f"{folder} lacks tensors of the model that its arguments describe",
        "Choose another --ckpt-step",
    )
    wrong = [
        f"{key} has shape {list(shapes[key])}, by the saved arguments it is {list(shape)}"
        for key, shape in keys.items()
        if shapes[key] != shape
    ]
    if wrong:
        raise ConfigError(f"{folder}: {wrong[0]} ({len(wrong)} such tensors)")
    unused = {key: list(shape) for key, shape in shapes.items() if key not in keys}
    report.extra = {key: shape for key, shape in unused.items() if key.startswith(_MODEL_PREFIXES)}
    report.ignored = {key: shape for key, shape in unused.items() if key not in report.extra}
    refuse(
        {key: shape for key, shape in report.extra.items() if not is_allowed(key, allow_extra)},
        f"{folder} has tensors that {plan.family.name} has no place for",
        "--allow-extra leaves out those whose name contains a given text",
    )
    report.mapped = {
        name: {
            "shape": list(plan.blueprint.shapes[name]),
            "transform": rule.transform,
            "hf": [str(part) for part in parts],
        }
        for name, (rule, parts) in plan.mapped.items()
    }
    report.count(plan.blueprint.shapes, {name: output.info.shape for name, output in plan.outputs.items()})


def _copied_tensors(plan: _Plan) -> tuple[SafetensorsReader, dict[str, TensorInfo]] | None:
    """Of a text model: the tensors that the family has beside the language model, from the source folder."""
    pattern = plan.family.copied_from_source
    if pattern is None or plan.settings["vision_mode"] != "none":
        return None
    advice = "pass the folder of the multimodal model with --hf-source, or export with --architecture "
    advice += "MiniMaxM3VLForCausalLM"
    if plan.hf_source is None:
        raise ConfigError(f"{plan.family.architecture} has a vision part that the checkpoint lacks; {advice}")
    try:
        reader = SafetensorsReader(plan.hf_source)
    except ConfigError as error:
        raise ConfigError(f"the vision part is needed, but {error}; {advice}") from error
    return reader, {name: info for name, info in reader.tensors.items() if re.fullmatch(pattern, name)}


def _config_text(plan: _Plan) -> str:
    """The source's config.json where it describes this model, otherwise one with its fields replaced."""
    from transformers import AutoConfig

    family, settings = plan.family, plan.settings
    dtype = max((output.info for output in plan.outputs.values()), key=lambda info: info.nbytes).dtype
    base = None
    if plan.hf_source is not None:
        raw = sidecar.read_config(plan.hf_source)
        if family.architecture in (raw.get("architectures") or []):
            base = sidecar.load_config(plan.hf_source)
            same = family.to_settings(base, settings["padded_vocab_size"])
            if settings["vision_mode"] == "none":
                same |= NO_VISION
            stored = raw.get("dtype", raw.get("torch_dtype"))
            if (
                all(same[name] == value for name, value in settings.items() if name not in family.free)
                and family.language_config(base).vocab_size == plan.geometry.vocab_size
                and stored == _short(dtype)
            ):
                return (plan.hf_source / sidecar.CONFIG_NAME).read_text(encoding="utf-8")
    fields = family.hf_fields(settings) | {"vocab_size": plan.geometry.vocab_size}
    vision = family.vision.to_hf(settings) if family.vision is not None else {}
    try:
        if base is None:
            # Special tokens are the tokenizer's business: the defaults of a class are those of one release.
            tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            if not family.text_config:
                base = AutoConfig.for_model(family.model_type, **fields, **tokens)
            elif vision:
                tower = {name: value for name, value in vision["vision_config"].items() if value is not None}
                whole = vision | {"vision_config": tower, "text_config": fields | tokens}
                base = AutoConfig.for_model(family.model_type, **whole)
            else:
                raise ConfigError(f"a configuration of {family.architecture} is needed; pass --hf-source")
        _set_fields(family.language_config(base), fields)
        if vision:
            _set_fields(base, vision)
            base.merged_hidden_size = settings["hidden_size"] * settings["vision_merge_size"] ** 2
    except ConfigError:
        raise
    except Exception as error:  # its validators have types of their own
        message = " ".join(str(error).split())
        raise ConfigError(f"transformers refuses the configuration of this model: {message[:300]}") from error
    base.architectures = [family.architecture]
    base.dtype = _short(dtype)
    written = json.loads(base.to_json_string())
    if family.serving_fields is not None:
        language = written["text_config"] if family.text_config else written
        language |= family.serving_fields(settings)
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def _set_fields(config: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name == "vision_config":
            _set_fields(config.vision_config, value)
        elif value is not None or hasattr(config, name):
            setattr(config, name, value)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
