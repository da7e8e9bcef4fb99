"""Conversion of a dense checkpoint: what is copied, what is added, and what is refused.

How training goes on from the result: tests/end_to_end/test_gqa_to_msa.py.
"""

import argparse
import copy
import json
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hf_models import save_model

from megatron_msa.checkpoint import gqa_to_msa  # isort: skip
from megatron_msa.checkpoint.hf import to_megatron
from megatron_msa.checkpoint.hf.torch_dist import Chunk, DistributedCheckpoint, write_checkpoint
from megatron_msa.checkpoint.tensor_list import describe_tensors
from megatron_msa.checkpoint.verify_gqa import verify
from megatron_msa.errors import ConfigError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model from Hugging Face as a Megatron checkpoint; its layers are stored in one tensor each."""
    folder = tmp_path_factory.mktemp("dense")
    save_model("qwen3", folder / "hf")
    to_megatron.convert(folder / "hf", folder / "megatron")
    return folder / "megatron"


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    opened = DistributedCheckpoint(checkpoint)
    return {key: opened.read(key, (0,) * len(shape), shape) for key, shape in opened.shapes.items()}


def rewritten(source: Path, target: Path, *, leave_out: str = "-", add: str = "", **arguments: Any) -> Path:
    """A copy with other arguments, without a tensor, or with one more."""
    opened = DistributedCheckpoint(source / "release")
    chunks = [
        Chunk(key, shape, offset, part, opened.dtypes[key], partial(opened.read, key, offset, part))
        for key, shape in opened.shapes.items()
        if leave_out not in key
        for offset, part in opened.chunks(key)
    ]
    if add:
        chunks.append(Chunk(add, (2,), (0,), (2,), torch.float32, partial(torch.zeros, 2)))
    common_state = dict(opened.common_state)
    common_state["args"] = argparse.Namespace(**vars(copy.copy(common_state["args"])) | arguments)
    objects = {name: opened.read_object(name) for name in opened.objects()}
    target.mkdir()
    write_checkpoint(target / "release", chunks, objects, common_state)
    shutil.copyfile(
        source / "latest_checkpointed_iteration.txt", target / "latest_checkpointed_iteration.txt"
    )
    return target


class TestConversion:
    @pytest.mark.parametrize("layers", ["1", "[0,1,1]"])
    def test_everything_is_copied_to_the_bit_and_index_branches_are_added(
        self, dense: Path, tmp_path: Path, layers: str
    ) -> None:
        report = gqa_to_msa.convert(dense, tmp_path / "msa", layer_freq=layers)
        before, after = tensors(dense / "release"), tensors(tmp_path / "msa/release")
        new = {key: value for key, value in after.items() if "index_branch" in key}
        if layers == "1":
            kept = {key: value for key, value in after.items() if key not in new}
        else:  # one tensor per layer
            names = {key.replace("layers.0.", "layers.") for key in after if "layers.0." in key}
            kept = {
                name: torch.stack([after[name.replace("layers.", f"layers.{n}.")] for n in range(3)])
                for name in names
            } | {key: value for key, value in after.items() if "layers." not in key}
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[key], before[key]) for key in before)
        assert all(value.abs().sum() > 0 for value in new.values())
        assert {key: list(value.shape) for key, value in new.items()} == report.initialised
        assert sum(value.numel() for value in after.values()) == report.megatron_parameters
        written = json.loads((tmp_path / "msa/conversion_report.json").read_text())
        assert written["initialised"] == report.initialised
        assert written["mapped"].keys() == after.keys() - new.keys()

    def test_the_model_is_the_same_with_full_attention(self, dense: Path, tmp_path: Path) -> None:
        gqa_to_msa.convert(dense, tmp_path / "msa", method="random")
        text = verify(dense / "release", tmp_path / "msa/release", num_tokens=45)
        assert "largest difference of a logit 0.00e+00" in text
        damaged = rewritten(tmp_path / "msa", tmp_path / "damaged")
        file = next((damaged / "release").glob("*.distcp"))
        content = bytearray(file.read_bytes())
        value = tensors(damaged / "release")["decoder.final_layernorm.weight"].numpy().tobytes()
        at = content.find(value)
        assert at > 0
        content[at : at + 64] = b"\x3e" * 64
        file.write_bytes(content)
        assert "0.00e+00 (" not in verify(dense / "release", damaged / "release", num_tokens=45)

    def test_the_same_seed_gives_the_same_random_index_branch(self, dense: Path, tmp_path: Path) -> None:
        found = []
        for number, seed in enumerate((7, 7, 8)):
            gqa_to_msa.convert(dense, tmp_path / str(number), method="random", seed=seed)
            found.append(tensors(tmp_path / f"{number}/release"))
        key = "decoder.layers.self_attention.index_branch.linear_index_q.weight"
        assert torch.equal(found[0][key], found[1][key])
        assert not torch.equal(found[0][key], found[2][key])
        assert not torch.equal(found[0][key][0], found[0][key][1])
        assert found[0][key].std() == pytest.approx(0.02, rel=0.1)


class TestRefusals:
    """Nothing is left under the target's name, nor beside it."""

    def refuse(self, message: str, load: Path, folder: Path, **options: Any) -> None:
        before = set(folder.iterdir())
        with pytest.raises(ConfigError, match=message):
            gqa_to_msa.convert(load, folder / "target", **options)
        assert set(folder.iterdir()) == before

    def test_a_folder_without_a_checkpoint(self, tmp_path: Path) -> None:
        self.refuse("holds no checkpoint", tmp_path / "nothing", tmp_path)

    def test_a_target_that_exists(self, dense: Path, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        self.refuse("exists; choose another folder", dense, tmp_path)

    def test_a_checkpoint_with_index_branches(self, dense: Path, tmp_path: Path) -> None:
        gqa_to_msa.convert(dense, tmp_path / "msa")
        self.refuse("has index branches already", tmp_path / "msa", tmp_path)

    def test_a_truncated_file(self, dense: Path, tmp_path: Path) -> None:
        load = rewritten(dense, tmp_path / "damaged")
        file = next((load / "release").glob("*.distcp"))
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 1)
        self.refuse("__0_0.distcp is truncated", load, tmp_path)
        file.unlink()
        self.refuse("__0_0.distcp is missing", load, tmp_path)

    def test_too_little_disk(self, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        self.refuse("its disk has 0.0 GiB free", dense, tmp_path)

    def test_arguments_that_do_not_fit_the_tensors(self, dense: Path, tmp_path: Path) -> None:
        load = rewritten(dense, tmp_path / "groups", kv_channels=24)
        self.refuse("has tensors of other shapes .*self_attention", load, tmp_path)

    def test_a_missing_tensor(self, dense: Path, tmp_path: Path) -> None:
        load = rewritten(dense, tmp_path / "missing", leave_out="final_layernorm")
        self.refuse("lacks tensors .* decoder.final_layernorm.weight", load, tmp_path)

    def test_a_tensor_that_the_model_does_not_have(self, dense: Path, tmp_path: Path) -> None:
        load = rewritten(dense, tmp_path / "extra", add="vision.weight")
        self.refuse("does not have: vision.weight", load, tmp_path)

    def test_an_index_head_that_cannot_be_derived(self, dense: Path, tmp_path: Path) -> None:
        self.refuse("--msa-indexer-head-dim is 1000", dense, tmp_path, index_head_dim=1000)


def test_tensors_of_many_layers_share_a_line():
    names = [
        (f"decoder.layers.{layer}.mlp.experts.{expert}.w", (2, 3)) for layer in (0, 1, 3) for expert in (0, 1)
    ]
    assert describe_tensors([*names, ("embedding.w", (5,))]) == [
        "decoder.layers.{0-1,3}.mlp.experts.{0-1}.w  [2, 3]  x 6",
        "embedding.w  [5]",
    ]
