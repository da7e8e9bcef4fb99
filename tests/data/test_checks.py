"""Data that cannot be trained on is refused before anything starts, with the reason and the way out."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training.config import TokenizerConfig

from megatron_msa.data.checks import read_index, validate_data_paths
from megatron_msa.data.metadata import load_tokenizer, meta_path
from megatron_msa.errors import ConfigError

MakeArgs = Callable[..., argparse.Namespace]
MakeDataset = Callable[..., str]

LENGTHS = [20, 30, 40, 50, 60, 40, 30, 20, 20, 40]


@pytest.fixture
def prefix(make_dataset: MakeDataset) -> str:
    return make_dataset("data", LENGTHS)


@pytest.fixture
def check(make_args: MakeArgs) -> Callable[..., None]:
    """Validate `--data-path PREFIX` with further flags."""

    def run(prefix: str, *flags: str, **values: Any) -> None:
        validate_data_paths(make_args("--data-path", prefix, "--split", "8,1,1", *flags, **values))

    return run


def test_a_good_dataset_passes_with_every_way_to_name_it(prefix: str, make_args: MakeArgs) -> None:
    for flags in (
        ["--data-path", prefix, "--split", "8,1,1"],
        ["--data-path", "0.3", prefix, "0.7", prefix, "--split", "8,1,1"],
        ["--train-data-path", prefix, "--valid-data-path", prefix],
        ["--mock-data"],
    ):
        validate_data_paths(make_args(*flags))


def test_the_index_summary_counts_tokens_of_any_range(prefix: str) -> None:
    index = read_index(prefix)
    assert (index.documents, index.tokens) == (len(LENGTHS), sum(LENGTHS))
    for begin, end in ((0, 10), (0, 0), (3, 7), (9, 10)):
        assert index.tokens_between(begin, end) == sum(LENGTHS[begin:end])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: str, check: Callable[..., None], suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(ConfigError, match=rf"data\{suffix} does not exist: check the path"):
        check(prefix)


def test_usual_slips_in_the_path_get_a_hint(prefix: str, check: Callable[..., None]) -> None:
    with pytest.raises(ConfigError, match="give the prefix without the suffix"):
        check(prefix + ".bin")
    with pytest.raises(ConfigError, match="every prefix needs a weight"):
        check("0.5", "--data-path", "0.5", prefix, prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-8, -2, 2])
def test_a_file_of_the_wrong_size_is_refused(
    prefix: str, check: Callable[..., None], suffix: str, change: int
) -> None:
    path = Path(prefix + suffix)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ConfigError, match=rf"data\{suffix} has {len(data) + change} bytes where"):
        check(prefix)


def test_an_index_cut_inside_its_header_or_of_another_kind_is_refused(
    prefix: str, check: Callable[..., None]
) -> None:
    path = Path(prefix + ".idx")
    data = path.read_bytes()
    path.write_bytes(data[:20])
    with pytest.raises(ConfigError, match="is truncated: 20 bytes do not hold the header"):
        check(prefix)
    path.write_bytes(b"PK\x03\x04" + data)
    with pytest.raises(ConfigError, match="is not a Megatron index"):
        check(prefix)


def test_a_dataset_without_documents_is_refused(tmp_path: Path, check: Callable[..., None]) -> None:
    prefix = str(tmp_path / "empty")
    IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16).finalize(prefix + ".idx")
    with pytest.raises(ConfigError, match="holds no document"):
        check(prefix)


def test_too_few_tokens_for_one_sequence_are_refused(prefix: str, check: Callable[..., None]) -> None:
    check(prefix, "--seq-length", "19")
    with pytest.raises(ConfigError, match=r"holds 350 tokens; one sequence of --seq-length 350 needs 351"):
        check(prefix, "--seq-length", "350")


def test_a_split_without_tokens_would_hang_and_is_refused(prefix: str, make_args: MakeArgs) -> None:
    args = make_args("--data-path", prefix, "--split", "98,1,1")
    with pytest.raises(ConfigError, match=r"the valid split of dataset .* holds 0 of its 10 documents"):
        validate_data_paths(args)
    args.split, args.eval_iters = "100,0,0", 0
    validate_data_paths(args)


def test_a_split_shorter_than_a_sequence_matters_only_if_it_is_used(
    prefix: str, check: Callable[..., None]
) -> None:
    with pytest.raises(
        ConfigError, match=r"the valid split of dataset .* and 20 tokens; one sequence needs 31"
    ):
        check(prefix, "--seq-length", "30")
    check(prefix, "--seq-length", "30", "--eval-iters", "0")


def test_evaluation_without_validation_data_is_refused(prefix: str, make_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match="--eval-iters is 1 but there is no validation data"):
        validate_data_paths(make_args("--data-path", prefix, "--split", "1,0,0"))
    with pytest.raises(ConfigError, match="--eval-iters is 1 but there is no validation data"):
        validate_data_paths(make_args("--train-data-path", prefix))


def test_no_data_at_all_is_refused(make_args: MakeArgs) -> None:
    # Megatron itself would train on mock data.
    with pytest.raises(ConfigError, match="no data: pass --data-path"):
        validate_data_paths(make_args())


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_another_vocabulary_is_refused(
    tmp_path: Path,
    make_args: MakeArgs,
    make_dataset: MakeDataset,
    bpe_config: TokenizerConfig,
    with_sidecar: bool,
) -> None:
    from megatron_msa.data.corpus import builtin_files, iter_documents, take_bytes
    from megatron_msa.data.preprocess import write_dataset

    prefix = str(tmp_path / "bpe")
    corpus = take_bytes(iter_documents(builtin_files()), 20_000)
    write_dataset(corpus, prefix, tokenizer_config=bpe_config, show_progress=False)
    if not with_sidecar:
        meta_path(prefix).unlink()
    args = make_args("--data-path", prefix, "--split", "1,0,0", "--eval-iters", "0")
    with pytest.raises(ConfigError, match=r"vocabulary mismatch: dataset .*bpe"):
        validate_data_paths(args)
    validate_data_paths(args, load_tokenizer(bpe_config))


def test_the_same_tokenizer_elsewhere_is_the_same_tokenizer(
    tmp_path: Path, prefix: str, make_args: MakeArgs, byte_config: TokenizerConfig
) -> None:
    import shutil

    assert byte_config.tokenizer_model is not None
    copy = shutil.copytree(byte_config.tokenizer_model, tmp_path / "copy")
    args = make_args("--data-path", prefix, "--split", "8,1,1", "--tokenizer-model", str(copy))
    validate_data_paths(args)


def test_a_null_tokenizer_needs_only_enough_ids(prefix: str, check: Callable[..., None]) -> None:
    check(prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", "258")
    with pytest.raises(ConfigError, match="vocabulary mismatch"):
        check(prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", "200")


def test_a_damaged_sidecar_is_named(prefix: str, check: Callable[..., None]) -> None:
    meta_path(prefix).write_text('{"documents": 1, "surprise": 2}')
    with pytest.raises(ConfigError, match=r"data\.meta\.json cannot be read"):
        check(prefix)


def test_unsupported_data_flags_are_refused(prefix: str, check: Callable[..., None]) -> None:
    for flag, message in (
        ("--reset-attention-mask", "use --dataloader-inter-document-masking instead"),
        ("--fim-data", "--sft and --fim-data are not supported"),
        ("--hybrid-context-parallel", "--hybrid-context-parallel is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(prefix, flag)


def test_arguments_are_left_as_they_were(prefix: str, make_args: MakeArgs) -> None:
    args = make_args("--data-path", prefix, "--split", "8,1,1")
    before = dict(vars(args))
    validate_data_paths(args)
    assert vars(args) == before
    assert not dataclasses.is_dataclass(args)
