"""Tiny images, samples, a tokenizer and streams for the tests of multimodal data."""

import io
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.data.multimodal.encode import SampleEncoder
from megatron_msa.data.multimodal.format import Sample, Text, Visual, write_dataset
from megatron_msa.data.multimodal.images import ImageSettings
from megatron_msa.model.vision.config import VisionConfig

EOD, IMAGE, VIDEO = 256, 258, 259
SEQ_LENGTH = 64


class ByteTokenizer:
    """Bytes, an end token, and two placeholders that a text can become, too."""

    eod = EOD
    vocab_size = 260

    def tokenize(self, text: str) -> list[int]:
        parts = text.split("<image>")
        ids = list(parts[0].encode())
        for part in parts[1:]:
            ids += [IMAGE, *part.encode()]
        return ids


def picture(height: int, width: int, seed: int = 0, *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A file of random pixels."""
    channels = () if mode == "L" else (len(mode),)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind)
    return file.getvalue()


def sample(number: int) -> Sample:
    """Number n has between 1 and 9 tokens of text and an image of 1 to 4 tokens (units of 4 x 4 pixels)."""
    image = picture(4 + 4 * (number % 2), 4 + 4 * (number // 2 % 2), seed=number)
    return Sample(f"k{number:03d}", (Text("abcdefghi"[: 1 + number % 9]), Visual((image,))))


def samples(count: int, start: int = 0) -> list[Sample]:
    return [sample(number) for number in range(start, start + count)]


def vision_config(**values: Any) -> VisionConfig:
    """Patches of 2 x 2 pixels and one frame, 2 x 2 of them to a token."""
    defaults = {
        "vision_mode": "train",
        "vision_image_token_id": IMAGE,
        "vision_video_token_id": VIDEO,
        "vision_num_layers": 1,
        "vision_hidden_size": 24,
        "vision_ffn_hidden_size": 32,
        "vision_num_attention_heads": 2,
        "vision_patch_size": 2,
        "vision_temporal_patch_size": 1,
    }
    return VisionConfig(**{**defaults, **values})


def data_config(path: str = "", **values: Any) -> MultimodalDataConfig:
    """Images of 16 to 1024 pixels; small buffers."""
    defaults = {
        "multimodal_data_path": path,
        "multimodal_min_pixels": 16,
        "multimodal_max_pixels": 1024,
        "multimodal_packing_buffer": 5,
        "multimodal_shuffle_buffer": 3,
    }
    return MultimodalDataConfig(**{**defaults, **values})


def encoder(seq_length: int = SEQ_LENGTH, **values: Any) -> SampleEncoder:
    vision = vision_config()
    images = ImageSettings.build(data_config(**values), vision)
    return SampleEncoder(ByteTokenizer(), images, vision, seq_length=seq_length)


def written(folder: Path, count: int = 24, shard: int = 5, extra: Iterable[Sample] = ()) -> str:
    """A dataset with `count` training samples and a few for validation; returns its path."""
    parts = {"train": [*samples(count), *extra], "val": samples(6, start=900)}
    return str(write_dataset(folder / "dataset", parts, samples_per_shard=shard))


def run_args(path: str, **values: Any) -> Namespace:
    """What the loaders read of Megatron's arguments."""
    config, vision = data_config(path), vision_config()
    defaults = {
        **vars(config),
        **vars(vision),
        "seq_length": SEQ_LENGTH,
        "seed": 1,
        "num_workers": 0,
        "micro_batch_size": 2,
        "iteration": 0,
        "consumed_train_samples": 0,
        "load": None,
        "save": None,
        "eval_iters": 0,
        "eval_global_batch_size": 4,
        "eval_micro_batch_size": 2,
        "data_parallel_size": 1,
        "dataloader_type": None,
        "dataloader_inter_document_masking": True,
        "calculate_per_token_loss": True,
        "full_validation": False,
        "multiple_validation_sets": False,
        "mock_data": False,
        "virtual_pipeline_model_parallel_size": None,
        "data_path": None,
        "train_data_path": None,
        "per_split_data_args_path": None,
    }
    return Namespace(**{**defaults, **values})
