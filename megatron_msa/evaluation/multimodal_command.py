"""The command line of tools/eval_multimodal.py: what a checkpoint makes of images, as JSON and as a table."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from megatron_msa.data.multimodal.checks import require_energon
from megatron_msa.data.multimodal.encode import Document, SampleEncoder
from megatron_msa.data.multimodal.format import Sample, SampleError, Text
from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.multimodal import (
    LETTERS,
    answer_accuracy,
    conditioned_perplexity,
    exchange_images,
    needle_sample,
)

Objects = Mapping[str, Sequence[bytes]]
"""What images show, and the files of those that show it."""


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder of pretrain_msa.py")
    parser.add_argument("--ckpt-step", type=int, help="iteration (default: the latest)")
    parser.add_argument(
        "--tokenizer-model", help="where the tokenizer lies now, if not where training had it"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    perplexity = parser.add_argument_group(
        "perplexity of the text behind images, with own and others' images"
    )
    perplexity.add_argument("--data", required=True, help="dataset, as --multimodal-data-path of training")
    perplexity.add_argument("--part", default="val", help="of the dataset (default: %(default)s)")
    perplexity.add_argument(
        "--samples", type=int, default=200, help="the first so many (default: %(default)s)"
    )
    needle = parser.add_argument_group(
        "visual needle: behind which image of a document stands what is asked for"
    )
    needle.add_argument(
        "--objects", type=Path, help="folder with a folder of image files for each thing that is asked for"
    )
    needle.add_argument(
        "--images", type=int, nargs="+", default=[2, 4, 8], help="images of a document (default: 2 4 8)"
    )
    needle.add_argument("--questions", type=int, default=300, help="documents (default: %(default)s)")
    needle.add_argument("--filler", default="the", help="text behind each image (default: %(default)s)")
    needle.add_argument("--seed", type=int, default=1)
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print a table, and write the results.

    Raises:
        ConfigError: a checkpoint, data or objects that cannot be used.
    """
    require_energon("--data")
    # Imports Energon.
    from megatron_msa.data.multimodal.loaders import LoaderFactory, Place
    from megatron_msa.data.multimodal.stream import read_samples
    from megatron_msa.inference.loading import load, tokenizer_for
    from megatron_msa.inference.processes import process_groups

    with process_groups():
        loaded = load(options.load, step=options.ckpt_step)
        model, args = loaded.model, loaded.args
        if getattr(args, "vision_mode", "none") == "none":
            raise ConfigError(
                f"the checkpoint in {options.load} has no vision encoder (--vision-mode none), so images are "
                "nothing to it"
            )
        args.multimodal_data_path = options.data
        tokenizer = tokenizer_for(args, tokenizer_model=options.tokenizer_model)
        encoder = LoaderFactory(args, tokenizer, Place(rank=0, ranks=1)).encoder
        result: dict[str, Any] = {"load": str(options.load), "iteration": loaded.iteration}
        try:
            samples = itertools.islice(read_samples(options.data, options.part), options.samples)
            documents = [encoder.decode(encoder.measure(sample)) for sample in samples]
            perplexity = conditioned_perplexity(model, documents, model.vision.placeholder_ids)
            data = {"data": options.data, "part": options.part, "samples": len(documents)}
            result["perplexity"] = {**data, **vars(perplexity)}
            if options.objects is not None:
                result["needle"] = needles(model, encoder, read_objects(options.objects), options)
        except SampleError as error:
            raise ConfigError(str(error)) from error
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return result


def read_objects(folder: Path) -> dict[str, list[bytes]]:
    """The images in a folder of folders; the name of a folder says what its images show.

    Raises:
        ConfigError: there are no two of them with images.
    """
    folders = sorted(each for each in folder.glob("*") if each.is_dir())
    files = {each.name: sorted(file for file in each.iterdir() if file.is_file()) for each in folders}
    objects = {name: [file.read_bytes() for file in found] for name, found in files.items() if found}
    if len(objects) < 2:
        raise ConfigError(
            f"--objects {folder} has {len(objects)} folders with images; it takes one for each thing to ask "
            "for, at least two, each named after what its images show"
        )
    return objects


def letter_tokens(encoder: SampleEncoder, names: Sequence[str], letters: str) -> list[int]:
    """The last token of an answer (a name and a letter) for each letter.

    Raises:
        ConfigError: the tokenizer joins letters with names, so that an answer is no single token.
    """
    tokens: list[int] = []
    for letter in letters:
        samples = [Sample("answer", (Text(f"{name}{letter}"),)) for name in names]
        found = {int(encoder.measure(sample).tokens[-2]) for sample in samples}
        if len(found) > 1 or found & set(tokens):
            raise ConfigError(
                f"the tokenizer gives no token of its own to the letter {letter} behind {', '.join(names)} "
                f"(tokens {sorted(found)}): name the folders of --objects otherwise, for example with a "
                "digit or a sign at the end"
            )
        tokens += found
    return tokens


def needles(
    model: nn.Module, encoder: SampleEncoder, objects: Objects, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The visual needle for each number of images.

    Args:
        model: `MultimodalGPT`, in evaluation mode.
        encoder: of its samples.
        objects: to show and ask for.
        options: images, questions, filler, seed.

    Raises:
        ConfigError: more images than objects or letters, or a tokenizer that answers cannot be read from.
    """
    most = min(len(objects), len(LETTERS))
    if not all(2 <= each <= most for each in options.images):
        raise ConfigError(f"--images is {options.images}; with {len(objects)} objects between 2 and {most}")
    rng = random.Random(options.seed)
    names = sorted(objects)
    answers = letter_tokens(encoder, names, LETTERS[: max(options.images)])
    result = []
    for images in options.images:
        documents: list[Document] = []
        for number in range(options.questions):
            chosen = rng.sample(names, images)
            shown = [(name, rng.choice(objects[name])) for name in chosen]
            fillers = [options.filler] * images
            sample = needle_sample(f"needle {number}", shown, fillers, asked=[rng.choice(chosen)])
            documents.append(encoder.decode(encoder.measure(sample)))
        others = [wrong for _, wrong in exchange_images(documents)]
        result.append(
            {
                "images": images,
                "questions": len(documents),
                "tokens": sum(len(each.tokens) for each in documents) / len(documents),
                "accuracy": answer_accuracy(model, documents, answers[:images]),
                # None: no two documents have images of the same sizes.
                "others_images": answer_accuracy(model, others, answers[:images]) if others else None,
                "chance": 1 / images,
            }
        )
    return result


def table(result: Mapping[str, Any]) -> str:
    """The results in lines."""
    found = result["perplexity"]
    lines = [
        f"perplexity of {found['tokens']} tokens behind images: {found['own']:.3f} with their own images, "
        f"{found['shuffled']:.3f} with others' ({found['left_out']} of {found['samples']} samples left out)"
    ]
    for each in result.get("needle", []):
        others = "none" if each["others_images"] is None else f"{each['others_images']:.1%}"
        lines.append(
            f"needle among {each['images']} images in {each['tokens']:.0f} tokens: {each['accuracy']:.1%} of "
            f"{each['questions']} right, with others' images {others}, chance {each['chance']:.1%}"
        )
    return "\n".join(lines)
