"""Reading documents: JSON lines, text files, directories, the built-in corpus."""

import json
from pathlib import Path

import pytest

from megatron_msa.data.corpus import builtin_files, iter_documents, list_input_files, take_bytes
from megatron_msa.errors import ConfigError


def test_builtin_corpus_is_real_text_of_some_megabytes_and_the_same_each_time() -> None:
    first = list(iter_documents(builtin_files()))
    assert [document.name for document in first] == [str(file) for file in builtin_files()]
    assert sum(len(document.text) for document in first) > 1_000_000
    assert first == list(iter_documents(builtin_files()))
    names = {Path(document.name).name for document in first}
    assert "argparse.py" in names
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_max_bytes_is_a_hard_limit_and_never_cuts_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü" * 10, encoding="utf-8")
    documents = list(take_bytes(iter_documents([tmp_path / "a.txt"]), 7))
    assert [document.text for document in documents] == ["äöü"]

    limited = list(take_bytes(iter_documents(builtin_files()), 100_000))
    assert 99_990 < sum(len(document.text.encode()) for document in limited) <= 100_000
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        list(take_bytes(iter_documents([]), 0))


def test_json_lines_are_documents_and_blank_lines_are_not(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\r\\ntwo"}\n\n{"text": "three", "id": 7}\n', encoding="utf-8")
    documents = list(iter_documents([file]))
    assert [document.text for document in documents] == ["one\r\ntwo", "three"]
    assert [document.name for document in documents] == [f"{file}:1", f"{file}:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', r"bad\.jsonl:2: not valid JSON"),
        (b"\xff\xfe\xfa", r"bad\.jsonl:2: not valid JSON"),
        (b'"a string"', r"bad\.jsonl:2: a JSON str; each line"),
        (b'{"body": "x", "id": 1}', r"bad\.jsonl:2: no key 'text'; its keys are \['body', 'id'\]"),
        (b'{"text": 5}', r"bad\.jsonl:2: 'text' holds a int"),
        (b'{"text": "\\ud800"}', r"bad\.jsonl:2: 'text' is not valid Unicode"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(json.dumps({"text": "good"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(ConfigError, match=message):
        list(iter_documents([file]))


def test_directories_and_globs_are_expanded_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", ".hidden", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = list_input_files([str(tmp_path)])
    assert [file.name for file in everything] == ["a.txt", "b.txt", "c.md", "d.txt"]
    assert [file.name for file in list_input_files([str(tmp_path)], "*.md")] == ["c.md"]
    repeated = list_input_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    assert [file.name for file in repeated] == ["a.txt", "b.txt"]


def test_missing_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no input given"):
        list_input_files([])
    with pytest.raises(ConfigError, match=r"gone\.txt does not exist"):
        list_input_files([str(tmp_path / "gone.txt")])
    with pytest.raises(ConfigError, match="no file matches the input pattern"):
        list_input_files([str(tmp_path / "*.txt")])
    with pytest.raises(ConfigError, match="no file in directory"):
        list_input_files([str(tmp_path)])


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        list(iter_documents([tmp_path / "latin.txt"]))
