# SPDX-License-Identifier: Apache-2.0
"""Claim: both spellings of triplets are read, and a wrong line is named with what was expected."""

import pytest

from data_gen.triplet_file import Triplet, read_triplets

GOOD = '{"input": "a cat", "edit": "make it a dog", "output": "a dog"}\n'


def test_both_spellings_are_read(tmp_path):
    file = tmp_path / "triplets.jsonl"
    generated = '{"caption": "a cat", "edit": "swap", "output": "a dog", "url": "http://x/1.jpg"}\n'
    file.write_text("\ufeff" + GOOD + "\n" + generated, "utf-8")
    first, second = read_triplets(file)
    assert first == Triplet("a cat", "make it a dog", "a dog")
    assert first.prompt() == {"input": "a cat", "edit": "make it a dog", "output": "a dog"}
    assert second.prompt()["url"] == "http://x/1.jpg"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"input": "a", "output": "b"}', 'line 2: no "edit"; expected input, edit and output'),
        ('{"edit": "a", "output": "b"}', 'line 2: no "input" (or "caption")'),
        ('{"input": " ", "edit": "a", "output": "b"}', "line 2: \"input\" is ' ', expected a text"),
        ('{"input": "a", "edit": 3, "output": "b"}', 'line 2: "edit" is 3, expected a text'),
        ('{"input": "a", "edit": ', "line 2: not JSON"),
        ('["a", "b", "c"]', "line 2: expected a JSON object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, expected):
    file = tmp_path / "triplets.jsonl"
    file.write_text(GOOD + line + "\n")
    with pytest.raises(ValueError) as raised:
        read_triplets(file)
    assert str(raised.value).startswith(f"{file}, {expected}")


def test_no_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_triplets(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no triplet"):
        read_triplets(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        read_triplets(tmp_path / "binary.jsonl")
