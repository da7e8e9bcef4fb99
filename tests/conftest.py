"""A fork server and a small text for whole pretraining runs; neither starts before a test asks for it."""

import json
from collections.abc import Iterator

import pytest

from tests.end_to_end.launching import Pretraining, Server, tiny_flags


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def pretrain(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Pretraining:
    """Runs of pretrain_msa.py; the text is 100 kB of documents between 20 and 600 bytes."""
    folder = tmp_path_factory.mktemp("data")
    words = ["block", "query", "key", "value", "index", "sparse", "dense", "token", "head", "layer"]
    with (folder / "text.jsonl").open("w") as file:
        for number in range(400):
            length = 4 + (number * 37) % 100
            text = " ".join(words[(number + i * i) % len(words)] for i in range(length))
            file.write(json.dumps({"text": text}) + "\n")
    arguments = ["--input", "text.jsonl", "--tokenizer-type", "bytes", "--output-prefix", "text"]
    process = server.start("preprocess_data.py", [*arguments, "--workers", "1"], folder, {}, "preprocess")
    assert server.wait(process) == 0, process.stderr
    data = ["--data-path", str(folder / "text"), "--split", "90,10,0"]
    data += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "byte_tokenizer")]
    return Pretraining(server, tiny_flags(), data)
