"""Documents to learn retrieval from: of exact length and share, and every repetition can be answered."""

import re
from collections import defaultdict

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_msa.data.retrieval import RetrievalSettings, iter_retrieval_documents, main, needle
from megatron_msa.errors import ConfigError

TEXT = "".join(f"Zeile {n}: größer als nichts.\n" for n in range(50))
LINE = re.compile(r"^magic ([A-Z]{3})(\d{4})\n", re.MULTILINE)


def documents(size: int, *, count: int = 8, seed: int = 1, text: str = TEXT, **changes) -> list[str]:
    settings = RetrievalSettings(document_bytes=size, **changes)
    found = iter_retrieval_documents(text, settings, documents=count, seed=seed)
    return [document.text for document in found]


@pytest.mark.parametrize("size", [400, 1023, 8191])
@pytest.mark.parametrize(("share", "occurrences"), [(0.4, 4), (0.25, 2), (0.9, 3)])
def test_length_share_and_repetitions_are_as_stated(size, share, occurrences):
    for text in documents(size, retrieval_share=share, occurrences=occurrences, nearest=20):
        assert len(text.encode()) == size
        found = LINE.findall(text)
        line_bytes = len(needle("ABC", "1234")) + 1
        keys = int(share * size) // (occurrences * line_bytes)
        assert len(found) == keys * occurrences, "each on a line of its own"
        values = defaultdict(set)
        for key, value in found:
            values[key].add(value)
        assert len(values) == keys
        assert all(len(each) == 1 for each in values.values()), "a key has one value"


def test_distances_span_every_scale():
    """Log-uniform: about as many repetitions between 64 and 512 bytes away as between 512 and 4096."""
    near = far = 0
    for text in documents(8191, count=30, nearest=64, retrieval_share=0.3):
        first = {}
        for match in LINE.finditer(text):
            if match[1] in first:
                distance = match.start() - first[match[1]]
                near += 64 <= distance < 512
                far += 512 <= distance < 4096
            first.setdefault(match[1], match.start())
    assert 0.5 < near / far < 2


def test_documents_depend_on_the_seed_and_their_number_alone():
    assert documents(700, count=3) == documents(700, count=8)[:3]
    assert documents(700, seed=1) != documents(700, seed=2)
    assert len(set(documents(700))) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval_share": 0.95}, r"--retrieval-share is 0\.95; it must be above 0"),
        ({"retrieval_share": 0.0}, "--retrieval-share is 0"),
        ({"occurrences": 1}, "--occurrences is 1"),
        ({"nearest": 700}, "--nearest is 700; .* below --document-bytes 700"),
        ({"retrieval_share": 0.05}, r"no room for one needle .*: take at least 1120 bytes"),
    ],
)
def test_settings_that_make_no_document_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        documents(700, **changes)


def test_more_keys_than_can_be_drawn_are_refused():
    with pytest.raises(ConfigError, match="would take 9362 keys of 3 letters, and at most 8788"):
        RetrievalSettings(document_bytes=1 << 20, retrieval_share=0.5)


@pytest.mark.parametrize(("text", "message"), [(" \n ", "haystack is empty"), ("one line", "no line break")])
def test_a_haystack_without_lines_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        documents(700, text=text)


def test_a_document_is_a_sample_of_the_dataset(tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text(TEXT)
    prefix = str(tmp_path / "out" / "train")
    arguments = [
        "--input",
        str(source),
        "--output-prefix",
        prefix,
        "--documents",
        "3",
        "--document-bytes",
        "511",
    ]
    assert main(arguments) == 0
    assert "32.9% of the bytes: 3 keys, each 4 times" in capsys.readouterr().out
    dataset = IndexedDataset(prefix)
    assert [len(dataset[n]) for n in range(len(dataset))] == [512] * 3
    assert bytes(dataset[0][:-1].astype("uint8")).decode() == documents(511, count=1, seed=1234)[0]
    assert main(arguments) == 2
    assert main([*arguments, "--builtin-corpus"]) == 2
    assert main([*arguments[:-3], "0", *arguments[-2:]]) == 2
    assert "--documents is 0" in capsys.readouterr().err
