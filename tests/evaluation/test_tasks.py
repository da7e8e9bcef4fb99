"""Every task is solved by a model that reads and by no other, and never a token longer than asked for."""

import random
import re

import pytest

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import questions
from megatron_msa.evaluation.fitting import fit
from megatron_msa.evaluation.haystack import from_texts, insert
from megatron_msa.evaluation.plan import Cell
from megatron_msa.evaluation.protocol import Tokens
from megatron_msa.evaluation.scoring import METHODS
from megatron_msa.evaluation.tasks.question_answering import read_items
from megatron_msa.evaluation.tasks.registry import TASK_NAMES, Material, make_task
from tests.evaluation.oracles import ANSWERERS, ByteTokenizer, Oracle, PairTokenizer

LONG_ENOUGH = {"common_words": 8011}
STYLES = ("instruct", "completion")


def ask(name, material, tokenizer, *, lies=False, depth=None):
    tokens = Tokens(tokenizer)
    cell = Cell("msa", name, LONG_ENOUGH.get(name, 2503), depth)
    fitted = questions.fitted_samples(make_task(name, material), tokens, cell, samples=3, seed=5)
    model = Oracle(name, tokenizer, lies=lies)
    return questions.measure(model, tokens, fitted, methods=METHODS)


def test_every_task_has_an_oracle():
    assert set(TASK_NAMES) == set(ANSWERERS)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TASK_NAMES)
def test_right_answers_score_one_and_wrong_ones_zero(name, style, material):
    tokenizer = PairTokenizer() if name == "multi_key" else ByteTokenizer()
    right = ask(name, material(style), tokenizer)
    assert right["scores"] == {method: [1.0] * 3 for method in METHODS}
    wrong = ask(name, material(style), tokenizer, lies=True)
    assert wrong["scores"] == {method: [0.0] * 3 for method in METHODS}
    spellings = 2 if name == "question_answering" else 1
    assert right["chance"] == pytest.approx(spellings / (spellings + 5))
    assert min(right["answer_log_probability"]) > max(wrong["answer_log_probability"])


def test_part_of_the_answers_is_part_of_the_score(material):
    class Forgetful(Oracle):
        def __init__(self, task: str) -> None:
            super().__init__(task)
            read = self.answers
            self.answers = lambda prompt: read(prompt)[:1]

    tokens = Tokens(ByteTokenizer())
    for name, share in (("multi_value", 1 / 4), ("multi_query", 1 / 4), ("variable_tracking", 1 / 5)):
        fitted = questions.fitted_samples(
            make_task(name, material("instruct")), tokens, Cell("msa", name, 1200), samples=2, seed=1
        )
        result = questions.measure(Forgetful(name), tokens, fitted, methods=["generation"])
        assert result["scores"]["generation"] == [share] * 2


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TASK_NAMES)
def test_prompt_and_reply_fill_the_length_and_never_exceed_it(name, style, tokenizer, material):
    task, tokens = make_task(name, material(style)), Tokens(tokenizer)
    longest = fit(task, tokens, length=10**6, depth=0.3, seed="seed") if task.most_units else None
    for length in (LONG_ENOUGH.get(name, 1501), LONG_ENOUGH.get(name, 1501) + 1, 9001):
        fitted = fit(task, tokens, length=length, depth=0.3, seed="seed")
        assert fitted.tokens == max(map(len, fitted.prompts)) + fitted.room <= length
        assert [tokens.encode(prompt) for prompt in fitted.sample.prompts()] == fitted.prompts
        if longest is not None and length > longest.tokens + 100:
            assert fitted.ran_out
            assert fitted.tokens == longest.tokens
        else:
            # A line, a word or a paragraph more would be too much, or the rest is below 1/256.
            assert not fitted.ran_out
            assert length - fitted.tokens <= max(length // 256, 100)


def test_a_length_that_fits_by_one_token_is_used_and_one_less_is_refused(material):
    task, tokens = make_task("needle", material()), Tokens(ByteTokenizer())
    bare = task.build(0, 0.5, random.Random("x"))
    (question,) = bare.questions
    assert bare.context + question.cue + question.answers[0] == bare.context + bare.context.strip()
    needed = len(bare.prompts()[0]) + 2 * len(question.answers[0]) + 8
    assert fit(task, tokens, length=needed, depth=0.5, seed="x").tokens == needed
    with pytest.raises(
        ConfigError, match=rf"needle takes {needed} tokens .* length is {needed - 1}: use lengths"
    ):
        fit(task, tokens, length=needed - 1, depth=0.5, seed="x")


def test_the_same_seed_gives_the_same_sample_and_another_one_another(material):
    tokens = Tokens(ByteTokenizer())
    for name in TASK_NAMES:
        length = LONG_ENOUGH.get(name, 1501)
        first, again, other = (
            fit(make_task(name, material()), tokens, length=length, depth=0.5, seed=seed) for seed in "aab"
        )
        assert first == again
        assert first.sample != other.sample


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("style", STYLES)
def test_the_needle_lies_at_its_depth(depth, style, material):
    fitted = fit(
        make_task("needle", material(style)), Tokens(ByteTokenizer()), length=6000, depth=depth, seed="d"
    )
    intro, body = "", fitted.sample.context
    if style == "instruct":
        intro, body = body.split("\n\n", 1)
        assert intro
    (answer,) = fitted.sample.questions[0].answers
    (line,) = re.findall(rf"^.*{answer}.*\n", body, re.MULTILINE)
    rest = len(body) - len(line)
    assert abs(body.index(line) / rest - depth) < 60 / rest, "more than a line off"
    assert body.count(answer) == 1


def test_other_needles_come_first_among_the_distractors(material):
    sample = make_task("multi_key", material("instruct", distractors=3)).build(0, 0.5, random.Random(1))
    (question,) = sample.questions
    assert len(set(question.distractors)) == 3
    assert all(value in sample.context for value in question.distractors)
    assert question.answers[0] not in question.distractors


def test_frequencies_are_those_of_the_definitions(material):
    common = make_task("common_words", material("completion"))
    sample = common.build(70, 0.5, random.Random(3))
    listed = re.findall(r"\d+\. (\w+)", sample.context)
    answers = set(sample.questions[0].answers)
    assert len(answers) == 10
    assert {listed.count(each) for each in answers} == {30}
    assert {listed.count(each) for each in set(listed) - answers} == {3}
    assert len(set(listed)) == 10 + 10 * 5 + 70

    frequent = make_task("frequent_words", material("completion"))
    sample = frequent.build(850, 0.5, random.Random(3))
    words = sample.context.split()
    counts = [words.count(each) for each in ("...", *sample.questions[0].answers)]
    assert counts == [607, 151, 67, 37], "1000 / zeta(2) / k^2, rounded down"
    assert max(words.count(each) for each in sample.questions[0].distractors) == 24


@pytest.mark.parametrize("units", [0, 3])
def test_the_paragraph_with_the_answer_is_always_there(units, material):
    task = make_task("question_answering", material())
    assert task.most_units == 6
    for seed in range(20):
        sample = task.build(units, 0.5, random.Random(seed))
        (question,) = sample.questions
        assert f"is {question.answers[0]}." in sample.context
        assert sample.context.count("Document ") == units + 1
        assert not set(question.distractors) & set(question.answers)


def test_a_start_token_can_be_left_out_and_an_end_token_always_is():
    tokenizer = PairTokenizer()
    tokens, ids = Tokens(tokenizer), tokenizer.tokenize("abcd")[1:-1]
    assert tokens.start == [tokenizer.start]
    assert tokens.encode("abcd") == [tokenizer.start, *ids]
    assert tokens.encode_bare("abcd") == ids
    bytes_alone = Tokens(ByteTokenizer())
    assert bytes_alone.start == []
    assert bytes_alone.encode("ab") == bytes_alone.encode_bare("ab") == [97, 98]


def test_lines_are_inserted_at_the_nearest_break():
    lines = ["aaaa\n", "bb\n", "cccccc\n"]  # breaks at 0, 5, 8, 15
    assert insert(lines, [(0.4, "X")]) == "aaaa\nX\nbb\ncccccc\n"  # 6 is nearer to 5
    assert insert(lines, [(0.5, "X")]) == "aaaa\nbb\nX\ncccccc\n"
    assert insert(lines, [(1.0, "X"), (0.0, "Y"), (1.0, "Z")]) == "Y\naaaa\nbb\ncccccc\nX\nZ\n"
    assert insert([], [(0.7, "X"), (0.2, "Y")]) == "X\nY\n"


def test_a_haystack_without_text_is_refused():
    with pytest.raises(ConfigError, match=r"haystack is empty: blanks holds no text.*built-in corpus"):
        from_texts(["", " \n\n\t\n"], "blanks")


def test_long_paragraphs_are_cut_at_sentences_and_wrap_around():
    haystack = from_texts(["One. " * 100, "short. stays. whole."], "prose")
    assert haystack.lines[-1] == "short. stays. whole.\n"
    assert set(haystack.lines[:-1]) == {"One.\n"}
    stretch = haystack.stretch(0.999, 3)
    assert stretch == ["short. stays. whole.\n", "One.\n", "One.\n"]


def test_unknown_tasks_and_missing_material_are_refused(haystack):
    without = Material(haystack=haystack, style="completion", distractors=3)
    with pytest.raises(ConfigError, match=r"unknown task 'niah'; there are needle, multi_key, "):
        make_task("niah", without)
    with pytest.raises(ConfigError, match="question_answering needs --qa-file"):
        make_task("question_answering", without)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "a", "question": "b"}', "answers"),
        ('{"context": "a", "question": "b", "answers": []}', "none of them empty"),
        ('{"context": "a", "question": "b", "answers": "c"}', "a list of texts"),
        ("[1]", "not a question"),
        ("not json", "not a question"),
        ('{"context": "a", "question": "b", "answers": ["c"]}', "fewer than two different paragraphs"),
    ],
)
def test_a_malformed_question_file_is_refused(text, message, tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        read_items(path)
