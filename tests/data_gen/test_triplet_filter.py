# SPDX-License-Identifier: Apache-2.0
"""Claims: answers are read strictly and judged by the released rules; lengths by characters."""

import json

import pytest

from data_gen.prompt import answer, messages, read_answer
from data_gen.triplet_file import Triplet
from data_gen.triplet_filter import Limits, fault, judge

GOOD = {"edit": "make it a dog", "output": "a dog"}


def reason(said: object, finish: str = "stop", caption: str = "a cat") -> str:
    text = said if isinstance(said, str) else json.dumps(said)
    return judge(caption, text, finish, Limits()).reason


def test_what_is_taught_is_read():
    triplet = Triplet("eine Katze", "mach „Hund“ daraus", "ein Hund\n im  Haus")
    assert read_answer(answer(triplet)) == ("mach „Hund“ daraus", "ein Hund im Haus")
    assert messages("x", [triplet])[1:] == [
        {"role": "user", "content": "eine Katze"},
        {"role": "assistant", "content": answer(triplet)},
        {"role": "user", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (GOOD, ""),
        ("Sure: {}", "not_json"),
        ("", "not_json"),
        (json.dumps(GOOD)[:-1], "not_json"),
        ("[" * 100_000, "not_json"),
        ([GOOD], "not_schema"),
        ({"edit": "x"}, "not_schema"),
        ({**GOOD, "why": "because"}, "not_schema"),
        ({**GOOD, "edit": 3}, "not_schema"),
        ({**GOOD, "output": " \n"}, "not_schema"),
        ('{"edit": "make it \\ud83d", "output": "a dog"}', "not_schema"),
        ({**GOOD, "edit": "x"}, "edit_length"),
        ({**GOOD, "edit": "x" * 201}, "edit_length"),
        ({**GOOD, "output": "x" * 501}, "output_length"),
        ({"edit": "加雪", "output": "雪中的猫"}, ""),
    ],
)
def test_reasons(said, expected):
    assert reason(said) == expected


def test_what_the_server_says_of_an_answer_comes_first():
    assert reason(GOOD, "length") == "cut"
    assert reason(GOOD, "content_filter") == "filtered"


@pytest.mark.parametrize("output", ["a cat", " A Cat. ", "a CAT?!", "A cat..."])
def test_unchanged_as_the_released_code_compares(output):
    assert fault("a cat!", "do nothing", output, Limits()) == "unchanged"
    assert fault("a cat!", "do nothing", f"{output} and a dog", Limits()) == ""


def test_control_a_full_stop_within_is_a_change():
    assert fault("a cat", "end it", "a. cat", Limits()) == ""
