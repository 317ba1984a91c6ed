# SPDX-License-Identifier: Apache-2.0
"""Claims: every line that cannot be taught is named with what is wrong in it, in one go; captions
that are nearly the same are found, and no others."""

import json

import pytest

from data_gen.triplet_checks import check
from data_gen.triplet_file import Triplet, to_line, to_old_line
from data_gen.triplet_filter import Limits

GOOD = [
    Triplet("a cat on a mat", "make it a dog", "a dog on a mat"),
    Triplet("a red house by the sea", "paint it blue", "a blue house by the sea"),
]


def found(tmp_path, *lines):
    """(number of good triplets, what was found) of a file of GOOD and some lines."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(map(to_line, GOOD)) + "\n".join(lines) + "\n", "utf-8")
    good, findings = check([file], Limits())
    return len(good), [str(finding).replace(str(file), "F") for finding in findings]


def line(*texts):
    return to_line(Triplet(*texts))


def test_both_spellings_and_the_old_format_are_fine(tmp_path):
    lines = [
        json.dumps({"caption": "a boat", "edit": "sink it", "output": "a sunken boat"}),
        to_old_line(Triplet("a lake", "freeze it", "a frozen lake")),
    ]
    assert found(tmp_path, *lines) == (4, [])


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes"),
        ('{"input": "a", "edit": "b"}', 'no "output"; expected input, edit and output'),
        (line("a lake", "as it is", "A lake."), '"output" says the same as "input"'),
        (line("a lake", "x", "a sea"), '"edit" has 1 characters, expected 2 to 200'),
        (line("a lake", "x" * 201, "a sea"), '"edit" has 201 characters, expected 2 to 200'),
        (line("a lake", "widen it", "sea" * 200), '"output" has 600 characters, expected 2 to 500'),
        (line("lake" * 200, "widen it", "a sea"), '"input" has 800 characters, expected 2 to 500'),
        (line("A  Cat", "x\n%%\ny", "a dog"), r"holds '\n%%\n', by which the old format tells"),
        (line("A Cat on a mat.", "Make it a dog", "A dog on a mat"), "says the same as F, line 1"),
    ],
)
def test_wrong_lines_are_named(tmp_path, wrong, what):
    count, (finding,) = found(tmp_path, wrong.strip())
    assert count == 2
    assert finding.startswith(f"error: F, line 3: {what}")


def test_all_are_named(tmp_path):
    count, findings = found(tmp_path, "{", "", "[]", line("a sea", "dry it", "a desert"), "3")
    assert count == 3
    assert [finding.split(":")[1] for finding in findings] == [f" F, line {i}" for i in (3, 5, 8)]


def test_overlaps_are_warned_of(tmp_path):
    """Also between files; other edits of the same caption are allowed."""
    count, findings = found(
        tmp_path,
        line("a cat on a mat", "add a mouse", "a cat and a mouse on a mat").strip(),
        line("The red house by the sea", "let it burn", "A burning house by the sea").strip(),
        line("a red horse by the sea", "add a rider", "a rider on a red horse").strip(),
    )
    assert count == 5
    assert findings == [
        "warning: F, line 3: its caption is nearly that of F, line 1",
        "warning: F, line 4: its caption is nearly that of F, line 2",
    ]
    other = tmp_path / "other.jsonl"
    other.write_text(line("A cat on a mat", "add a hat", "a cat with a hat on a mat"))
    good, between = check([tmp_path / "mine.jsonl", other], Limits())
    assert len(good) == 6 and [str(one.file) for one in good][-1] == str(other)
    assert str(between[-1]).startswith(f"warning: {other}, line 1: its caption is nearly that of")
