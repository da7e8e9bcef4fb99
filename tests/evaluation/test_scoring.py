"""What counts as an answer."""

import pytest

from megatron_msa.evaluation.samples import Question
from megatron_msa.evaluation.scoring import chance, score_ranking, score_reply


def question(*answers: str, **changes) -> Question:
    return Question(cue="?", answers=answers, **changes)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("123 and 456", 1.0),
        ("456", 0.5),
        ("41234, 4567", 0.0),
        ("_123_ 456a", 0.0),
        ("(123).456!", 1.0),
        ("", 0.0),
        ("no\n123", 0.5),
    ],
)
def test_answers_count_as_whole_words(reply, score):
    assert score_reply(question("123", "456"), reply) == score


def test_case_and_special_characters_of_an_answer_do_not_matter():
    assert score_reply(question("A+b (c)"), "it is a+B (C), surely") == 1.0


def test_one_of_several_spellings_is_enough():
    spellings = question("New York", "NYC", any_answer=True)
    assert [score_reply(spellings, reply) for reply in ("nyc", "new york", "york")] == [1.0, 1.0, 0.0]


def test_what_follows_the_first_line_does_not_count_where_that_is_said():
    assert score_reply(question("7", first_line=True), "8\n7") == 0.0
    assert score_reply(question("7", first_line=True), "7\n8") == 1.0


@pytest.mark.parametrize(
    ("answers", "distractors", "score"),
    [
        ([-1.0], [-2.0, -3.0], 1.0),
        ([-2.0], [-1.0, -3.0], 0.0),
        ([-1.0], [-1.0], 0.0),  # a tie is no find
        ([-1.0, -4.0], [-2.0, -3.0], 0.5),
        ([-1.0, -2.0], [-3.0], 1.0),
        ([-9.0, -8.0], [-1.0, -2.0], 0.0),
    ],
)
def test_ranking_gives_the_share_of_answers_at_the_top(answers, distractors, score):
    names = tuple(map(str, range(len(answers))))
    assert score_ranking(question(*names), answers, distractors) == score


def test_with_spellings_the_best_candidate_decides():
    spellings = question("a", "b", any_answer=True)
    assert score_ranking(spellings, [-5.0, -1.0], [-2.0]) == 1.0
    assert score_ranking(spellings, [-5.0, -2.0], [-2.0]) == 0.0


def test_chance_is_what_random_rankings_score():
    assert chance(question("a", distractors=("b", "c", "d"))) == 1 / 4
    assert chance(question("a", "b", distractors=("c", "d", "e"))) == 2 / 5
