"""A checkpoint of several gigabytes is converted in the memory of its largest tensors, even after a kill.

The figures are printed (`pytest -s`); docs/conversion.md quotes them.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import REPOSITORY, launch

from megatron_msa.training import no_gpu  # isort: skip

no_gpu.install_if_no_gpu()

from megatron_msa.checkpoint.hf.safetensors_files import (  # noqa: E402
    SafetensorsReader,
    SafetensorsWriter,
    TensorInfo,
)

HIDDEN, FFN, VOCABULARY, LAYERS = 4096, 11008, 32_000, 12
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
}
LARGEST = VOCABULARY * HIDDEN * 2
"""Bytes of the embedding, the largest tensor on either side."""
PROGRAM = "tests/checkpoint/hf_memory_program.py"


def shapes() -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        key_rows = HIDDEN // 4
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (key_rows, HIDDEN)),
            ("self_attn.v_proj", (key_rows, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (FFN, HIDDEN)),
            ("mlp.up_proj", (FFN, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, FFN)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            result[f"{prefix}.{name}.weight"] = shape
    return {**result, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def random_rows(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensor in pieces; another in every place, so that a swap would be seen."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for piece in torch.empty(shape, device="meta").split(1024):
        yield torch.randint(-(2**15), 2**15, piece.shape, generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def kill_while_it_writes(source: Path, target: Path, result: Path, enough: int) -> None:
    """Start the conversion and kill it when it has written this many bytes."""
    command = [sys.executable, str(REPOSITORY / PROGRAM), "to_megatron", *map(str, (source, target, result))]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    leftover = target.parent / f".{target.name}.incomplete"
    deadline = time.monotonic() + 240
    while not leftover.is_dir() or folder_bytes(leftover) < enough:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_model_and_a_kill_does_no_harm(tmp_path: Path) -> None:
    source, checkpoint, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes().items()}
    SafetensorsWriter(source, infos, 10**9).write(lambda name: random_rows(name, infos[name].shape))
    size = sum(2 * math.prod(info.shape) for info in infos.values())
    times = {path: path.stat().st_mtime_ns for path in source.iterdir()}

    kill_while_it_writes(source, checkpoint, tmp_path / "killed.json", size // 2)
    assert not checkpoint.exists()
    for direction, one, other in (("to_megatron", source, checkpoint), ("to_hf", checkpoint, back)):
        result = tmp_path / f"{direction}.json"
        launch(PROGRAM, direction, one, other, result, timeout=400)
        figures = json.loads(result.read_text())
        grown = figures["peak"] - figures["before"]
        print(
            f"\n{direction}: {size / 2**30:.2f} GiB in {figures['seconds']:.0f} s, peak "
            f"{figures['peak'] / 2**30:.2f} GiB, of it {grown / 2**30:.2f} GiB for tensors (largest: "
            f"{LARGEST / 2**30:.2f} GiB)"
        )
        # The parts read and what they are put together to; writing copies neither.
        assert grown < 3 * LARGEST
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == times
    first, last = SafetensorsReader(source), SafetensorsReader(back)
    assert first.tensors == last.tensors
    for name in first.tensors:
        # As integers: random bits are also NaNs, which equal nothing.
        assert torch.equal(first.read(name).view(torch.int16), last.read(name).view(torch.int16)), name
