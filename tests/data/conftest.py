"""Small tokenizers, corpora and Megatron arguments for the data tests."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments
from megatron.training.config import TokenizerConfig

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer
from megatron_msa.data.corpus import Document, builtin_files, iter_documents, take_bytes
from megatron_msa.data.metadata import load_tokenizer
from megatron_msa.data.preprocess import write_dataset


@pytest.fixture(scope="session")
def byte_config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    directory = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes")
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))


@pytest.fixture(scope="session")
def bpe_config(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A BPE of 512 ids, trained on 200 kB of the built-in corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document.text for document in take_bytes(iter_documents(builtin_files()), 200_000)]
    tokenizer.train_from_iterator(texts, trainer)
    directory = tmp_path_factory.mktemp("tokenizers") / "bpe"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(str(directory))
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))


@pytest.fixture(scope="session")
def byte_tokenizer(byte_config: TokenizerConfig) -> Any:
    return load_tokenizer(byte_config)


@pytest.fixture
def make_dataset(tmp_path: Path, byte_config: TokenizerConfig) -> Callable[..., str]:
    """Write documents of the given lengths in tokens, end of document included; returns the prefix.

    The text of document 0 is all "a", of document 1 all "b", and so on.
    """

    def make(name: str, lengths: list[int]) -> str:
        prefix = str(tmp_path / name)
        texts = [chr(ord("a") + order % 26) * (length - 1) for order, length in enumerate(lengths)]
        documents = [Document(str(order), text, len(text)) for order, text in enumerate(texts)]
        write_dataset(documents, prefix, tokenizer_config=byte_config, show_progress=False)
        return prefix

    return make


@pytest.fixture
def make_args(byte_config: TokenizerConfig) -> Callable[..., argparse.Namespace]:
    """Megatron's own argument defaults with `flags`, and the values that its validation would fill in."""

    def make(*flags: str, **values: Any) -> argparse.Namespace:
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        assert byte_config.tokenizer_model is not None
        tokenizer = [
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            byte_config.tokenizer_model,
        ]
        small = ["--seq-length", "16", "--micro-batch-size", "2", "--eval-iters", "1"]
        args = parser.parse_args([*tokenizer, *small, *flags])
        derived = {"eval_micro_batch_size": args.micro_batch_size, "data_parallel_size": 1, "rank": 0}
        derived["msa_cp_layout"] = "auto"
        for name, value in {**derived, **values}.items():
            setattr(args, name, value)
        return args

    return make
