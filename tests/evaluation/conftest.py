"""Small texts to hide things in, and questions."""

import json
from pathlib import Path

import pytest

from megatron_msa.evaluation.haystack import Haystack, from_texts
from megatron_msa.evaluation.tasks.question_answering import read_items
from megatron_msa.evaluation.tasks.registry import Material

COUNTRIES = ["Aland", "Borduria", "Carpania", "Drachma", "Elbonia", "Freedonia", "Genovia"]


@pytest.fixture(scope="session")
def haystack() -> Haystack:
    return from_texts(
        [f"Line {n} says {'very ' * (n % 7)}little." + "\n" * (n % 3) for n in range(400)], "lines"
    )


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qa") / "questions.jsonl"
    rows = [
        {
            "context": f"{country} lies by the sea. The capital of {country} is {country[:3]}burg.",
            "question": f"What is the capital of {country}?",
            "answers": [f"{country[:3]}burg", f"Old {country[:3]}burg"],
        }
        for country in COUNTRIES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def material(haystack: Haystack, qa_file: Path):
    """Makes the material of a style."""

    def make(style: str = "completion", distractors: int = 5) -> Material:
        return Material(haystack=haystack, style=style, distractors=distractors, items=read_items(qa_file))

    return make
