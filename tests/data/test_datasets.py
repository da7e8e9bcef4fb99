"""The train, validation and test datasets that Megatron builds from its flags."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

from megatron_msa.data.batch import BatchSettings
from megatron_msa.data.datasets import build_datasets, make_datasets_provider

MakeArgs = Callable[..., argparse.Namespace]
MakeDataset = Callable[..., str]


def test_labels_are_the_tokens_shifted_by_one(
    make_args: MakeArgs, make_dataset: MakeDataset, byte_tokenizer: Any
) -> None:
    prefix = make_dataset("data", [37, 5, 90, 60])
    args = make_args("--data-path", prefix, "--split", "1,0,0")
    train, valid, test = build_datasets(args, byte_tokenizer, (8, 0, 0))
    assert isinstance(train, GPTDataset)
    assert (valid, test) == (None, None)
    for sample in (train[index] for index in range(len(train))):
        torch.testing.assert_close(sample["labels"][:-1], sample["tokens"][1:])
        assert "attention_mask" not in sample
        assert "cu_seqlens" not in sample
        assert sample["position_ids"].tolist() == list(range(16))
        assert sample["loss_mask"].tolist() == [1.0] * 16


def test_end_of_document_can_be_left_out_of_the_loss(
    make_args: MakeArgs, make_dataset: MakeDataset, byte_tokenizer: Any
) -> None:
    args = make_args("--data-path", make_dataset("data", [7] * 30), "--split", "1,0,0", "--eod-mask-loss")
    train, _, _ = build_datasets(args, byte_tokenizer, (8, 0, 0))
    for sample in (train[index] for index in range(len(train))):
        is_end = sample["tokens"] == byte_tokenizer.eod
        assert is_end.any()
        torch.testing.assert_close(sample["loss_mask"], (~is_end).float())


@pytest.mark.parametrize("weighted", [True, False])
def test_blends_draw_from_every_dataset(
    make_args: MakeArgs, make_dataset: MakeDataset, byte_tokenizer: Any, weighted: bool
) -> None:
    first, second = make_dataset("first", [100] * 10), make_dataset("second", [50] * 10)
    paths = ["0.25", first, "0.75", second] if weighted else [first, second, first]
    args = make_args("--data-path", *paths, "--split", "8,1,1")
    train, valid, test = build_datasets(args, byte_tokenizer, (40, 4, 4))
    assert isinstance(train, BlendedDataset)
    drawn = [int(train[index]["dataset_id"]) for index in range(40)]
    assert (drawn.count(0), drawn.count(1)) == (10, 30) if weighted else set(drawn) == {0, 1, 2}
    assert valid is not None
    assert test is not None


def test_each_split_may_have_its_own_data(
    make_args: MakeArgs, make_dataset: MakeDataset, byte_tokenizer: Any
) -> None:
    args = make_args(
        "--train-data-path", make_dataset("t", [100] * 4), "--valid-data-path", make_dataset("v", [60] * 2)
    )
    train, valid, test = build_datasets(args, byte_tokenizer, (20, 5, 0))
    assert len(train) >= 20
    assert len(valid) >= 5
    assert test is None


def test_mock_data_builds_through_the_provider(make_args: MakeArgs, byte_tokenizer: Any) -> None:
    args = make_args("--mock-data")
    provider = make_datasets_provider(args, lambda: byte_tokenizer)
    assert provider.is_distributed is True  # type: ignore[attr-defined]
    assert "vp_stage" in inspect.signature(provider).parameters  # Megatron asks for it with virtual stages
    for dataset in provider((4, 2, 2)):
        assert isinstance(dataset, MockGPTDataset)
        assert dataset[0]["tokens"].shape == (16,)


@pytest.mark.parametrize(
    ("tp_rank", "is_end_stage", "separate", "built"),
    [(0, True, False, True), (0, False, False, False), (0, False, True, True), (1, True, True, False)],
)
def test_datasets_are_built_where_data_is_read(
    make_args: MakeArgs,
    byte_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tp_rank: int,
    is_end_stage: bool,
    separate: bool,
    built: bool,
) -> None:
    """On tensor-parallel rank 0 of the end stages; with separated documents of the middle stages, too."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: tp_rank)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(parallel_state, "is_pipeline_first_stage", lambda **_: is_end_stage)
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda **_: False)
    flags = ["--mock-data", "--micro-batch-size", "1"]
    args = make_args(*flags, *(["--dataloader-inter-document-masking"] if separate else []))
    train, _, _ = build_datasets(args, byte_tokenizer, (4, 2, 2))
    assert (train is not None) == built


def test_layouts_that_cannot_carry_documents_are_refused(make_args: MakeArgs) -> None:
    masking = "--dataloader-inter-document-masking"
    predicting = ["--context-parallel-size", "2", "--mtp-num-layers", "1"]
    with pytest.raises(ValueError, match="needs --msa-cp-layout documents, got auto"):
        BatchSettings.from_args(make_args(masking, *predicting))
    with pytest.raises(ValueError, match="needs --msa-cp-layout zigzag, got balanced"):
        BatchSettings.from_args(make_args(*predicting, msa_cp_layout="balanced"))
    with pytest.raises(ValueError, match="--pipeline-model-parallel-size 2 and a micro batch of 2"):
        BatchSettings.from_args(make_args(masking, "--pipeline-model-parallel-size", "2"))
    small = make_args(masking, "--pipeline-model-parallel-size", "2", "--micro-batch-size", "1")
    assert BatchSettings.from_args(small).separate_documents
