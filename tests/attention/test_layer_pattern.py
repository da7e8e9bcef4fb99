"""Layer patterns mean what they mean in Megatron, and nothing but patterns is evaluated."""

import re

import pytest

from megatron_msa.errors import ConfigError
from megatron_msa.layer_pattern import parse_layer_pattern

FLAG = "--msa-layer-freq"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", [1, 1, 1, 1]),
        (2, [1, 0, 1, 0]),
        ("3", [1, 0, 0, 1]),
        ("[0,1,1,0]", [0, 1, 1, 0]),
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        ("2*[0,1]", [0, 1, 0, 1]),
        ("([0]+[1])*2", [0, 1, 0, 1]),
        ([1, 0, 0, 0], [1, 0, 0, 0]),
    ],
)
def test_a_pattern_becomes_one_entry_per_layer(value, expected):
    assert parse_layer_pattern(value, 4, FLAG) == expected


def test_the_result_is_not_the_list_that_was_given():
    given = [1, 1]
    assert parse_layer_pattern(given, 2, FLAG) is not given


@pytest.mark.parametrize("value", ["0", 0, -1])
def test_a_frequency_below_one_is_refused(value):
    with pytest.raises(ConfigError, match=f"{FLAG} is {value}; an integer frequency must be at least 1"):
        parse_layer_pattern(value, 4, FLAG)


@pytest.mark.parametrize("value", ["[1]*3", "[]"])
def test_a_pattern_of_another_length_is_refused(value):
    with pytest.raises(ConfigError, match=re.escape("layers, the model has 4 (--num-layers)")):
        parse_layer_pattern(value, 4, FLAG)


def test_entries_other_than_0_and_1_are_refused():
    with pytest.raises(ConfigError, match=re.escape(f"{FLAG} may hold only 0 and 1, got [0, 1, 2]")):
        parse_layer_pattern("[0,1,2,2]", 4, FLAG)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "-1",
        "1.0",
        "[1",
        "[True]*4",
        "[[1]]*4",
        "2*3",
        "[1]*[1]",
        "[1]+1",
        "[1]**4",
        "list()",
        "a\0b",
    ],
)
def test_anything_else_is_refused_without_being_run(text):
    with pytest.raises(ConfigError, match=re.escape("expected an integer N (every N-th layer) or a list")):
        parse_layer_pattern(text, 4, FLAG)
