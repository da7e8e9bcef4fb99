"""Files: safetensors against the library, damaged ones refused, targets that appear at once or not at all."""

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.hf_models import save_model

from megatron_msa.checkpoint.hf import target, to_hf, to_megatron, torch_dist  # isort: skip
from megatron_msa.checkpoint.hf.megatron_model import single_process
from megatron_msa.checkpoint.hf.safetensors_files import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsReader,
    SafetensorsWriter,
    TensorInfo,
)
from megatron_msa.errors import ConfigError

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "stacked": torch.arange(24).reshape(4, 3, 2),
    "nothing": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
}


def write(folder: Path, tensors: dict[str, Tensor], limit: int) -> None:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    SafetensorsWriter(folder, infos, limit).write(lambda name: iter([tensors[name]]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "llama"
    save_model("llama", folder)
    return folder


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


class TestSafetensors:
    def test_the_library_reads_what_is_written(self, tmp_path: Path) -> None:
        write(tmp_path, TENSORS, 10**9)
        found = load_file(tmp_path / SINGLE_NAME)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
        with safe_open(tmp_path / SINGLE_NAME, "pt") as file:
            assert file.metadata() == {"format": "pt"}, "transformers asks for this"

    def test_what_the_library_writes_is_read(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / SINGLE_NAME)
        reader = SafetensorsReader(tmp_path)
        for name, tensor in TENSORS.items():
            assert reader.tensors[name] == TensorInfo(tuple(tensor.shape), tensor.dtype)
            assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read("stacked", 2), TENSORS["stacked"][2])

    def test_shards_hold_no_more_than_they_may_unless_a_tensor_is_larger(self, tmp_path: Path) -> None:
        write(tmp_path, TENSORS, 64)
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        files = sorted(tmp_path.glob("*.safetensors"))
        assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
        sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
        assert all(sum(each) <= 64 or len(each) == 1 for each in sizes)
        assert max(map(len, sizes)) > 1
        assert torch.equal(SafetensorsReader(tmp_path).read("stacked"), TENSORS["stacked"])

    def test_a_tensor_may_come_in_pieces(self, tmp_path: Path) -> None:
        tensor = torch.randn(6, 4)
        info = {"x": TensorInfo((6, 4), torch.float32)}
        SafetensorsWriter(tmp_path, info, 10**9).write(lambda _: iter(tensor.split([1, 3, 2])))
        assert torch.equal(load_file(tmp_path / SINGLE_NAME)["x"], tensor)

    @pytest.mark.parametrize("pieces", [[torch.zeros(2, 4)], [torch.zeros(6, 4).half()]])
    def test_a_tensor_that_was_announced_otherwise_is_an_error(
        self, pieces: list[Tensor], tmp_path: Path
    ) -> None:
        info = {"x": TensorInfo((6, 4), torch.float32)}
        with pytest.raises(ValueError, match="x: announced"):
            SafetensorsWriter(tmp_path, info, 10**9).write(lambda _: iter(pieces))


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def _truncate_header(folder: Path) -> None:
    os.truncate(sorted(folder.glob("*.safetensors"))[0], 40)


def _empty(folder: Path) -> None:
    os.truncate(sorted(folder.glob("*.safetensors"))[0], 0)


def _append(folder: Path) -> None:
    with sorted(folder.glob("*.safetensors"))[0].open("ab") as file:
        file.write(b"more")


def _scramble_header(folder: Path) -> None:
    with sorted(folder.glob("*.safetensors"))[0].open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.write(b"x" * length)


def _remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()


def _remove_all(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _break_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")


def _swap_shards(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


DAMAGES: dict[Callable[[Path], None], str] = {
    _truncate: r"00002-of-\d+.safetensors is truncated: it has \d+ bytes, its header describes",
    _truncate_header: "is truncated or damaged: its header does not fit",
    _empty: "is not a safetensors file or is damaged",
    _append: "is damaged: it has",
    _scramble_header: "is not a safetensors file or is damaged",
    _remove_shard: r"lacks 1 of \d+ shards that its index names: model-00003",
    _remove_all: "has neither model.safetensors.index.json nor model.safetensors",
    _break_index: "index.json cannot be read",
    _swap_shards: "does not fit",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_before_anything_is_written(
    damage: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    damage(model)
    with pytest.raises(ConfigError, match=DAMAGES[damage]):
        to_megatron.convert(model, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which cannot be converted; known are"),
        ({"vocab_size": 80}, r"embed_tokens.weight has shape \[90, 36\], by config.json it is \[80, 36\]"),
        ({"intermediate_size": 60}, r"mlp.gate_proj.weight has shape \[56, 36\], by config.json it is \[60"),
        ({"num_key_value_heads": 3}, r"k_proj.weight has shape \[16, 36\], by config.json it is \[24, 36\]"),
        ({"num_hidden_layers": 4}, r"lacks what these tensors .* \(6\): decoder.layers.3"),
        ({"num_hidden_layers": 2}, r"has tensors that Llama does not have .* \(9\): model.layers.2"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\)"),
        ({"hidden_size": 35}, "transformers cannot read .*config.json: .*not a multiple"),
    ],
)
def test_a_config_that_does_not_fit_the_files_is_refused(
    changes: dict[str, object], message: str, model: Path, tmp_path: Path
) -> None:
    _edit(model, **changes)
    with pytest.raises(ConfigError, match=message):
        to_megatron.convert(model, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_parts_of_one_megatron_tensor_must_have_one_type(model: Path, tmp_path: Path) -> None:
    tensors = {name: SafetensorsReader(model).read(name) for name in SafetensorsReader(model).tensors}
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
    _remove_all(model)
    save_file(tensors, model / SINGLE_NAME)
    with pytest.raises(ConfigError, match=r"gate_proj.weight and .*up_proj.weight have different types"):
        to_megatron.convert(model, tmp_path / "target")


def test_a_part_of_a_megatron_tensor_is_never_thrown_away(model: Path, tmp_path: Path) -> None:
    reader = SafetensorsReader(model)
    tensors = {name: reader.read(name) for name in reader.tensors if "layers.1.self_attn.k_proj" not in name}
    _remove_all(model)
    save_file(tensors, model / SINGLE_NAME)
    with pytest.raises(ConfigError, match=r"has model.layers.1.self_attn.q_proj.weight, .* but not all of"):
        to_megatron.convert(model, tmp_path / "target", allow_missing=["linear_qkv"])


def test_the_rotary_buffer_of_old_files_is_ignored_and_reported(model: Path, tmp_path: Path) -> None:
    reader = SafetensorsReader(model)
    tensors = {name: reader.read(name) for name in reader.tensors}
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _remove_all(model)
    save_file(tensors | {buffer: torch.ones(4)}, model / SINGLE_NAME)
    report = to_megatron.convert(model, tmp_path / "target")
    assert report.ignored == {buffer: [4]}


class TestTarget:
    def test_an_existing_target_is_refused(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        with pytest.raises(ConfigError, match=r"target exists; choose another folder"):
            to_megatron.convert(model, tmp_path / "target")
        assert not list((tmp_path / "target").iterdir())

    def test_a_disk_that_is_too_small_is_noticed_before_writing(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
        monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ConfigError, match=r"needs about 0.1 GiB, its disk has 0.0 GiB free"):
            to_megatron.convert(model, tmp_path / "new/target")
        assert not list((tmp_path / "new").iterdir())

    def test_two_conversions_to_one_target_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        with (
            target.new_folder(tmp_path / "target", expected_bytes=0) as folder,
            pytest.raises(ConfigError, match="another process is writing"),
            target.new_folder(tmp_path / "target", expected_bytes=0),
        ):
            pass
        assert not folder.exists()

    def test_an_error_while_writing_leaves_nothing(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch_dist, "save_config", full)
        with pytest.raises(OSError, match="No space left"):
            to_megatron.convert(model, tmp_path / "target")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def killed_in_the_middle(work: Callable[[], object]) -> None:
    """Run ``work`` in a process that is to kill itself."""
    with single_process():  # a forked process cannot make process groups of its own
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process was to be killed while it worked"
    assert os.WTERMSIG(status) == signal.SIGKILL


def after(count: int, function: Callable[..., object]) -> Callable[..., object]:
    """``function`` until its ``count``-th call, which kills the process."""
    calls = iter(range(count))

    def wrapped(*args: object, **kwargs: object) -> object:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(owner: object, name: str, work: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, after(9, getattr(owner, name)))
            killed_in_the_middle(work)

    return run


class TestInterruption:
    def test_a_killed_import_leaves_no_checkpoint_and_the_next_run_succeeds(
        self, model: Path, tmp_path: Path, interrupt: Callable[..., None]
    ) -> None:
        before = digest(model)
        interrupt(torch_dist, "_write_item", lambda: to_megatron.convert(model, tmp_path / "target"))
        leftover = tmp_path / ".target.incomplete"
        assert leftover.is_dir(), "it was killed while it wrote"
        assert not (tmp_path / "target").exists()
        with pytest.raises(ConfigError, match="has no checkpoint"):
            to_hf.convert(leftover, tmp_path / "back")
        with pytest.raises(ConfigError, match="is not a complete torch_dist checkpoint"):
            torch_dist.DistributedCheckpoint(leftover / "release")
        assert digest(model) == before
        to_megatron.convert(model, tmp_path / "target")
        assert not leftover.exists()
        assert (tmp_path / "target/release/metadata.json").is_file()

    def test_a_killed_export_leaves_no_model_and_the_next_run_succeeds(
        self, model: Path, tmp_path: Path, interrupt: Callable[..., None]
    ) -> None:
        checkpoint = tmp_path / "checkpoint"
        to_megatron.convert(model, checkpoint)
        before = digest(checkpoint / "release")
        reader = torch_dist.DistributedCheckpoint
        interrupt(reader, "read", lambda: to_hf.convert(checkpoint, tmp_path / "target"))
        assert (tmp_path / ".target.incomplete").is_dir()
        assert not (tmp_path / "target").exists()
        assert digest(checkpoint / "release") == before
        to_hf.convert(checkpoint, tmp_path / "target")
        assert not (tmp_path / ".target.incomplete").exists()
        assert SafetensorsReader(tmp_path / "target").tensors == SafetensorsReader(model).tensors


class TestDamagedCheckpoint:
    @pytest.fixture
    def checkpoint(self, llama: Path, tmp_path: Path) -> Path:
        to_megatron.convert(llama, tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    def test_truncated_data(self, checkpoint: Path, tmp_path: Path) -> None:
        (data,) = (checkpoint / "release").glob("*.distcp")
        os.truncate(data, data.stat().st_size // 2)
        with pytest.raises(ConfigError, match=r"distcp is truncated: [\d,]+ bytes of at least"):
            to_hf.convert(checkpoint, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert not (tmp_path / ".back.incomplete").exists()

    def test_no_metadata(self, checkpoint: Path, tmp_path: Path) -> None:
        (checkpoint / "release/metadata.json").unlink()
        with pytest.raises(ConfigError, match="is not a complete torch_dist checkpoint"):
            to_hf.convert(checkpoint, tmp_path / "back")

    def test_a_vocabulary_that_is_too_large(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"to have 129 rows, the checkpoint .* has 128"):
            to_hf.convert(checkpoint, tmp_path / "back", vocab_size=129)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has no checkpoint"):
            to_hf.convert(tmp_path / "nowhere", tmp_path / "back")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("20 kb", 20_000), ("7", 7)])
def test_shard_sizes(text: str, size: int) -> None:
    assert to_hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "5TB", "-1GB", "1.5GB"])
def test_shard_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size is"):
        to_hf.parse_size(text)
