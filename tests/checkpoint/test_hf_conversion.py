"""Every family from transformers to Megatron and back: the same logits, then the same bytes."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hf_models import MODELS, VOCABULARY, save_model

from megatron.core import dist_checkpointing, parallel_state  # isort: skip
from megatron_msa.checkpoint.hf import to_hf, to_megatron, verify  # isort: skip
from megatron_msa.checkpoint.hf.families import FAMILIES, MINIMAX_M3, by_config
from megatron_msa.checkpoint.hf.megatron_model import single_process
from megatron_msa.checkpoint.hf.safetensors_files import SafetensorsReader

FP32_NOISE = 2e-5
"""Logits are about 3; the two models differ in the order of additions: 3e-6 measured."""


class Converted(NamedTuple):
    source: Path
    checkpoint: Path
    """Target of the conversion to Megatron."""
    report: Any


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> the converted model; each is made once."""

    @cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> Converted:
        folder = tmp_path_factory.mktemp(name)
        save_model(name, folder / "hf", dtype=dtype)
        report = to_megatron.convert(folder / "hf", folder / "megatron")
        return Converted(folder / "hf", folder / "megatron", report)

    return make


def random_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 45), generator=torch.Generator().manual_seed(3))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By the names of the mapping tables (transformers itself saves some of MiniMax-M3 under others)."""
    reader = SafetensorsReader(folder, MINIMAX_M3.spelled)
    return {name: reader.read(name) for name in reader.tensors}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
def test_megatron_computes_the_logits_of_transformers(convert: Any, name: str) -> None:
    model = convert(name)
    tokens = random_tokens()
    expected = verify.hf_logits(model.source, tokens)
    actual = verify.megatron_logits(model.checkpoint / "release", tokens)
    assert actual.shape[-1] == 128, "the vocabulary is padded"
    assert expected.abs().max() > 1, "the comparison would say nothing"
    assert (actual[..., :VOCABULARY] - expected).abs().max() < FP32_NOISE


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_bytes_and_the_same_config(
    convert: Any, name: str, tmp_path: Path
) -> None:
    model = convert(name)
    report = to_hf.convert(model.checkpoint, tmp_path / "back", max_shard_bytes=20_000)
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(model.source))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "back/config.json").read_text() == (model.source / "config.json").read_text()
    assert report.padding_rows == 128 - VOCABULARY
    assert not report.extra
    assert not report.missing


def test_bf16_stays_bf16(convert: Any, tmp_path: Path) -> None:
    model = convert("minimax_m3_text", torch.bfloat16)
    to_hf.convert(model.checkpoint, tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert_same_tensors(back, tensors_of(model.source))


@pytest.mark.parametrize("metadata", [{}, {"singleton_local_shards": True, "non_homogeneous_layers": True}])
def test_a_checkpoint_that_megatron_saved_is_exported(
    convert: Any, metadata: dict[str, Any], tmp_path: Path
) -> None:
    """In both notations of Megatron: experts stacked, or one key each with gate and up apart."""
    model = convert("minimax_m3_text")
    common = to_hf.DistributedCheckpoint(model.checkpoint / "release").common_state
    folder = tmp_path / "run/iter_0000007"
    folder.mkdir(parents=True)
    with single_process():
        built = verify.load_megatron_model(model.checkpoint / "release")
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group()}
        state = built.sharded_state_dict(metadata=metadata | groups)
        dist_checkpointing.save(
            {"model": state, "args": common["args"], "iteration": 7}, str(folder), content_metadata=metadata
        )
    keys = to_hf.DistributedCheckpoint(folder).shapes.keys()
    assert ("decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in keys) == (not metadata)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7")
    to_hf.convert(tmp_path / "run", tmp_path / "back", hf_source=model.source)
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(model.source))


@pytest.mark.parametrize("name", ["llama", "minimax_m3_text"])
def test_a_config_written_anew_loads_in_transformers(convert: Any, name: str, tmp_path: Path) -> None:
    """As for a model that was trained here and never had a config.json."""
    model = convert(name)
    shutil.copytree(model.checkpoint, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/hf")
    to_hf.convert(tmp_path / "bare", tmp_path / "back", vocab_size=VOCABULARY)
    tokens = random_tokens()
    expected = verify.hf_logits(model.source, tokens)
    assert torch.equal(verify.hf_logits(tmp_path / "back", tokens), expected)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["eos_token_id"] is None, "another model's special tokens"
    if name == "minimax_m3_text":
        assert config["sparse_attention_config"]["sparse_attention_freq"] == [0, 1, 1]
        assert config["layer_types"] == ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]


def test_gains_around_zero_are_converted_for_a_family_that_has_them_around_one(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama trained with --apply-layernorm-1p: 1 is added on the way out, in fp32."""
    model = convert("llama")
    loaded = to_hf.from_arguments
    monkeypatch.setattr(
        to_hf, "from_arguments", lambda args: loaded(args) | {"layernorm_zero_centered_gamma": True}
    )
    to_hf.convert(model.checkpoint, tmp_path / "back")
    source, back = tensors_of(model.source), tensors_of(tmp_path / "back")
    gains = [name for name in source if "norm" in name]
    assert len(gains) == 7
    for name in gains:
        assert torch.equal(back[name], source[name] + 1)


class IndexRecords(NamedTuple):
    """Per MSA layer, in the model's order."""

    queries: list[Tensor]
    """[tokens, groups, d_i], rotated."""
    keys: list[Tensor]
    """[tokens, 1, d_i], rotated."""
    blocks: list[Tensor]
    """[tokens, groups, k]."""


def transformers_selection(folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> IndexRecords:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    records = IndexRecords([], [], [])
    rotate, select = modeling.apply_rotary_pos_emb, modeling.MiniMaxM3VLIndexer.forward
    within: list[bool] = []

    def rotating(*args: Any, **kwargs: Any) -> Any:
        query, key = rotate(*args, **kwargs)
        if within:
            records.queries.append(query[0].transpose(0, 1))
            records.keys.append(key[0].transpose(0, 1))
        return query, key

    def selecting(*args: Any, **kwargs: Any) -> Tensor:
        within.append(True)
        blocks = select(*args, **kwargs)
        within.clear()
        records.blocks.append(blocks[0].transpose(0, 1))
        return blocks

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rotating)
    monkeypatch.setattr(modeling.MiniMaxM3VLIndexer, "forward", selecting)
    verify.hf_logits(folder, tokens)
    return records


def megatron_selection(checkpoint: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> IndexRecords:
    from megatron_msa.attention import self_attention

    records = IndexRecords([], [], [])
    select = self_attention.block_select

    def selecting(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        selection = select(query, key, *args, **kwargs)
        records.queries.append(query)
        records.keys.append(key)
        records.blocks.append(selection.block_ids)
        return selection

    monkeypatch.setattr(self_attention, "block_select", selecting)
    verify.megatron_logits(checkpoint, tokens)
    return records


def test_the_index_branch_scores_and_selects_as_in_transformers(
    convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed release must select per group; those that share one selection can only be compared by
    their scores."""
    model = convert("minimax_m3_text")
    tokens = random_tokens()[:1]
    theirs = transformers_selection(model.source, tokens, monkeypatch)
    ours = megatron_selection(model.checkpoint / "release", tokens, monkeypatch)
    assert len(theirs.queries) == len(ours.queries) == 2
    selects_per_group = all(blocks.shape[1] == 2 for blocks in theirs.blocks)
    for layer in range(2):
        expected = torch.einsum("qgd,kod->gqk", theirs.queries[layer], theirs.keys[layer])
        actual = torch.einsum("qgd,kod->gqk", ours.queries[layer], ours.keys[layer])
        assert expected.abs().max() > 1
        assert (actual - expected).abs().max() < FP32_NOISE * expected.abs().max()
        if selects_per_group:
            chosen = [records.blocks[layer].sort(dim=-1).values for records in (ours, theirs)]
            assert torch.equal(chosen[0].long(), chosen[1])
            assert not torch.equal(chosen[0][:, 0], chosen[0][:, 1]), "the groups differ"
    assert selects_per_group, "transformers shares one selection: drop this line for such a release"


def test_the_report_accounts_for_every_tensor(convert: Any) -> None:
    model = convert("minimax_m3")
    written = json.loads((model.checkpoint / "conversion_report.json").read_text())
    assert written == {**written, **{key: getattr(model.report, key) for key in written}}
    tensors = tensors_of(model.source)
    mapped = {part.split("[")[0] for entry in written["mapped"].values() for part in entry["hf"]}
    assert mapped == tensors.keys()
    assert not written["extra"]
    assert written["hf_parameters"] == sum(tensors[name].numel() for name in mapped)
    padding = 2 * (128 - VOCABULARY) * 36
    assert written["megatron_parameters"] == written["hf_parameters"] + padding
    text = model.report.describe()
    assert f"{len(written['mapped'])}" in text


def test_a_missing_index_branch_is_initialised_only_when_asked_for(convert: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = convert("minimax_m3_text").source
    kept = {
        name: tensor
        for name, tensor in tensors_of(source).items()
        if "layers.2.self_attn.indexer" not in name
    }
    shutil.copytree(source, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(kept, tmp_path / "hf/model.safetensors")
    with pytest.raises(to_megatron.ConfigError, match=r"\(4\): decoder.layers.2.*index_branch"):
        to_megatron.convert(tmp_path / "hf", tmp_path / "refused")
    with pytest.raises(to_megatron.ConfigError, match="index_k_norm"):
        to_megatron.convert(tmp_path / "hf", tmp_path / "refused", allow_missing=["linear_index", "q_layer"])
    report = to_megatron.convert(tmp_path / "hf", tmp_path / "megatron", allow_missing=["index_branch"])
    assert len(report.initialised) == 4
    assert "index_k_norm.weight [6]" in report.describe()
    with single_process():
        loaded = dict(verify.load_megatron_model(tmp_path / "megatron/release").named_parameters())
    branch = "self_attention.index_branch"
    fresh = loaded[f"decoder.layers.2.{branch}.linear_index_q.weight"]
    assert 0.01 < fresh.std() < 0.03
    assert not loaded[f"decoder.layers.2.{branch}.index_k_norm.weight"].any(), "gains around zero start at 0"
    trained = loaded[f"decoder.layers.1.{branch}.linear_index_k.weight"]
    assert torch.equal(trained, kept["model.layers.1.self_attn.indexer.k_proj.weight"])


def test_a_family_is_found_by_what_the_model_computes(convert: Any) -> None:
    """Each model fits its own family and no other; MiniMax-M3's language model is written in two layouts."""
    for name in MODELS:
        model = convert(name)
        own = by_config(json.loads((model.source / "config.json").read_text()), "").architecture
        opened = to_hf.DistributedCheckpoint(model.checkpoint / "release")
        settings = to_hf.from_arguments(opened.common_state["args"])
        fitting = {family.architecture for family in FAMILIES if not family.misfits(settings)}
        assert own in fitting
        assert len(fitting) == (2 if name == "minimax_m3_text" else 1)


def test_a_model_that_fits_no_family_is_refused_with_the_difference(convert: Any, tmp_path: Path) -> None:
    model = convert("minimax_m3_text")
    with pytest.raises(to_hf.ConfigError, match=r"cannot be exported as Qwen3MoeForCausalLM: .*swiglu"):
        to_hf.convert(model.checkpoint, tmp_path / "back", architecture="Qwen3MoeForCausalLM")
    with pytest.raises(to_hf.ConfigError, match="GPT2LMHeadModel is unknown; known are LlamaForCausalLM"):
        to_hf.convert(model.checkpoint, tmp_path / "back", architecture="GPT2LMHeadModel")
    assert not (tmp_path / "back").exists()
