# SPDX-License-Identifier: Apache-2.0
"""Claims: captions are found by key and read again in order; repeated captions and urls are known;
a wrong line is named.
"""

import json

import numpy as np
import pytest

from data_gen.caption_index import FIRST, SAME_CAPTION, SAME_URL, CaptionIndex, key_of

ROWS = [
    {"caption": "a cat", "url": "http://x/1"},
    {"caption": " a cat "},
    {"caption": "a dog", "url": "http://x/1"},
    {"caption": "a cow", "url": None},
    {"caption": "a hen", "url": ""},
    {"caption": "a cat", "url": "http://x/2"},
    {"caption": "a pig", "url": "http://x/2"},
]


@pytest.fixture
def files(tmp_path):
    for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_repeats(files):
    """A line that repeats a caption does not stand in the way of its url's next caption."""
    index = CaptionIndex.open(files)
    expected = [FIRST, SAME_CAPTION, SAME_URL, FIRST, FIRST, SAME_CAPTION, FIRST]
    assert index.repeats.tolist() == expected


def test_found_and_read_again(files):
    index = CaptionIndex.open(files)
    for position in np.flatnonzero(index.repeats == FIRST).tolist():
        assert index.find(key_of(ROWS[position]["caption"])) == position
    assert index.find(key_of("a dog")) is None and index.find(0) is None
    assert index.find(2**64 - 1) is None
    read = list(index.read(index.repeats == FIRST))
    assert [position for position, *_ in read] == [0, 3, 4, 6]
    assert read[0] == (0, "a cat", "http://x/1") and read[1] == (3, "a cow", "")


def test_files_that_change_are_noticed(files):
    index = CaptionIndex.open(files)
    files[1].write_text(files[1].read_text().replace("hen", "fox"))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(index.read(np.ones(len(index), bool)))
    files[1].write_text(files[1].read_text().replace("fox", "hen") * 2)
    with pytest.raises(ValueError, match="changed while it was read"):
        list(index.read(np.ones(len(index), bool)))


@pytest.mark.parametrize(
    "line",
    [
        '{"input": "a cat"}',
        '{"caption": " "}',
        '{"caption": 3}',
        '{"caption": "a cat", "url": 3}',
        '{"caption": "half: \\ud83d"}',
        '["a cat"]',
        "a cat",
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    file = tmp_path / "captions.jsonl"
    file.write_text(f'{{"caption": "a cat"}}\n{line}\n')
    with pytest.raises(ValueError, match="captions.jsonl, line 2: expected"):
        CaptionIndex.open([file])


def test_no_file_and_no_caption(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        CaptionIndex.open([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: holds no caption"):
        CaptionIndex.open([tmp_path / "empty.jsonl"])
