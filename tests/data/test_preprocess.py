"""Text -> .bin/.idx -> text, and what happens when it goes wrong on the way."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.config import TokenizerConfig

from megatron_msa.data.byte_tokenizer import BYTE_EOD, BYTE_VOCAB_SIZE, write_byte_tokenizer
from megatron_msa.data.corpus import Document, builtin_files, iter_documents, take_bytes
from megatron_msa.data.encode import Encoder
from megatron_msa.data.metadata import DatasetMeta, load_tokenizer
from megatron_msa.data.preprocess import main, write_dataset
from megatron_msa.errors import ConfigError

TEXTS = ["plain ascii\n", "größe 你好 🙂\r\n\t trailing space  ", "\x00\x01\x7f control bytes", "x"]


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"text {order}", text, len(text)) for order, text in enumerate(texts)]


def first_document(prefix: str) -> list[int]:
    # The arrays of a dataset live in a memory map that is closed with it: keep it until they are copied.
    dataset = IndexedDataset(prefix)
    return dataset[0].tolist()


def test_byte_ids_are_the_bytes_and_decoding_is_exact(byte_config: TokenizerConfig) -> None:
    tokenizer = load_tokenizer(byte_config)
    assert (tokenizer.vocab_size, tokenizer.eod) == (BYTE_VOCAB_SIZE, BYTE_EOD) == (258, 256)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", ["byte_config", "bpe_config"])
def test_text_survives_the_round_trip(
    tmp_path: Path, tokenizer: str, workers: int, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(tokenizer)
    corpus = documents(TEXTS) + list(take_bytes(iter_documents(builtin_files()), 60_000))
    prefix = str(tmp_path / "data")
    meta = write_dataset(corpus, prefix, tokenizer_config=config, workers=workers, show_progress=False)

    model = load_tokenizer(config)
    dataset = IndexedDataset(prefix)
    assert dataset.index.dtype == numpy.uint16
    assert len(dataset) == len(corpus) == meta.documents
    assert int(dataset.sequence_lengths.sum()) == meta.tokens
    numpy.testing.assert_array_equal(dataset.document_indices, numpy.arange(len(corpus) + 1))
    for document, ids in zip(corpus, dataset[:], strict=True):
        assert ids[-1] == model.eod
        assert model.detokenize(ids[:-1].tolist()) == document.text
    assert DatasetMeta.read(prefix) == meta


def test_empty_documents_are_left_out_and_eod_is_optional(
    tmp_path: Path, byte_config: TokenizerConfig
) -> None:
    prefix = str(tmp_path / "data")
    meta = write_dataset(
        documents(["", "ab", ""]),
        prefix,
        tokenizer_config=byte_config,
        append_eod=False,
        show_progress=False,
    )
    assert (meta.documents, meta.tokens) == (1, 2)
    assert first_document(prefix) == [97, 98]


def test_input_without_text_is_refused(tmp_path: Path, byte_config: TokenizerConfig) -> None:
    with pytest.raises(ConfigError, match="no document with text"):
        write_dataset(documents([""]), str(tmp_path / "d"), tokenizer_config=byte_config, show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_leaves_no_files(
    tmp_path: Path, byte_config: TokenizerConfig, error: type[BaseException], workers: int
) -> None:
    def interrupted() -> Iterator[Document]:
        yield from documents(["x" * 1000] * 5)
        # By now the temporary file exists, under another name than the dataset's.
        names = [path.name for path in tmp_path.iterdir()]
        assert names
        assert all("partial" in name for name in names)
        raise error("stop")

    with pytest.raises(error):
        write_dataset(
            interrupted(),
            str(tmp_path / "d"),
            tokenizer_config=byte_config,
            workers=workers,
            show_progress=False,
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_kept_unless_told_otherwise(
    tmp_path: Path, byte_config: TokenizerConfig
) -> None:
    prefix = str(tmp_path / "d")

    def write(text: str, *, overwrite: bool = False) -> None:
        write_dataset(
            documents([text]),
            prefix,
            tokenizer_config=byte_config,
            overwrite=overwrite,
            show_progress=False,
        )

    write("old")
    stale_cache = tmp_path / "d" / "cache" / "GPTDataset_indices"
    stale_cache.mkdir(parents=True)
    with pytest.raises(ConfigError, match="exist already"):
        write("new")
    assert first_document(prefix) == [*b"old", BYTE_EOD]
    write("newer", overwrite=True)
    assert first_document(prefix) == [*b"newer", BYTE_EOD]
    assert not stale_cache.exists()


def test_an_id_outside_the_vocabulary_is_refused_and_not_wrapped() -> None:
    class Broken:
        vocab_size, eod = 10, 9

        def tokenize(self, text: str) -> list[int]:
            return [3, 70_000]

    with pytest.raises(
        ConfigError, match=r"here\.txt: the tokenizer gave id 70000, outside its vocabulary of 10"
    ):
        Encoder(Broken()).encode(Document("here.txt", "x", 1))


def test_a_tokenizer_without_an_end_token_must_be_told_so() -> None:
    class Endless:
        vocab_size, eod = 10, None

    with pytest.raises(ConfigError, match="--no-append-eod"):
        Encoder(Endless())
    assert Encoder(Endless(), append_eod=False).eod is None


def test_a_missing_tokenizer_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"gone does not exist: --tokenizer-model"):
        load_tokenizer(config)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    with pytest.raises(ConfigError, match="cannot build the tokenizer --tokenizer-type HuggingFaceTokenizer"):
        load_tokenizer(config)


def test_command_line_writes_bytes_and_tells_how_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"body": "hello"}) + "\n")
    prefix = tmp_path / "out" / "data"
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--json-key", "body", "--output-prefix", str(prefix)]
    assert main([*arguments, "--tokenizer-type", "bytes", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    tokenizer = tmp_path / "out" / "byte_tokenizer"
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} --data-path {prefix}" in out
    assert "documents   1" in out
    assert "tokens      6 (uint16)" in out
    assert first_document(str(prefix)) == [*b"hello", BYTE_EOD]

    assert main([*arguments, "--tokenizer-type", "bytes", "--workers", "1"]) == 2
    assert "exist already" in capsys.readouterr().err


def test_bytes_do_not_replace_another_tokenizer(
    tmp_path: Path, bpe_config: TokenizerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bpe_config.tokenizer_model is not None
    (tmp_path / "in.txt").write_text("hello")
    arguments = [
        "--input",
        str(tmp_path / "in.txt"),
        "--output-prefix",
        str(tmp_path / "d"),
        "--workers",
        "1",
    ]
    assert (
        main([*arguments, "--tokenizer-type", "bytes", "--tokenizer-model", bpe_config.tokenizer_model]) == 2
    )
    assert "holds another tokenizer" in capsys.readouterr().err
    assert write_byte_tokenizer(tmp_path / "t") == write_byte_tokenizer(tmp_path / "t")
