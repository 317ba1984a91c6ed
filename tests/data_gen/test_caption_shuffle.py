# SPDX-License-Identifier: Apache-2.0
"""Claims: captions spread over files and read in order are each there once, in an order that the
seed alone decides and that is random; spreading goes on wherever it was stopped."""

import random
import shutil

import numpy as np
import pytest

from data_gen import caption_shuffle
from data_gen.caption_shuffle import Item, Progress, in_order, order_of, parts, spread, to_line

CAPTIONS = [f"caption {i}" for i in range(3000)]


def items_of(path):
    """Lines of a text file; those with a # are left out."""
    for line in path.read_text("utf-8").splitlines():
        yield Item(line, "", "marked" if "#" in line else "")


def spread_texts(folder, sources, seed=0):
    return spread(
        sources,
        items_of,
        lambda item: caption_shuffle.order_of(item.caption, seed),
        folder,
        lambda _: None,
    )


def ordered(folder, lines, seed=0, name="source"):
    """(captions in order, those left out) of some lines."""
    source = folder / f"{name}.txt"
    source.write_text("\n".join(lines), "utf-8")
    shutil.rmtree(folder / name, ignore_errors=True)
    spread_texts(folder / name, [source], seed)
    items = list(in_order(folder / name, seed))
    return [x.caption for x in items if not x.reason], [x for x in items if x.reason]


def test_the_seed_alone_decides_the_order(tmp_path):
    """Not the order in which captions come, nor what else there is."""
    got, again = ordered(tmp_path, CAPTIONS)
    assert sorted(got) == sorted(CAPTIONS) and not again
    assert ordered(tmp_path, CAPTIONS[::-1])[0] == got
    some = set(CAPTIONS[:1000])
    assert ordered(tmp_path, CAPTIONS[:1000])[0] == [x for x in got if x in some]
    assert ordered(tmp_path, CAPTIONS, seed=1)[0] != got


def test_the_order_is_random(tmp_path):
    """Ranks of 8 seeds correlate as independent ones do: neither with the order of the input nor
    with each other (standard deviation 1 / sqrt(3000))."""
    ranks = [np.argsort([order_of(x, seed) for x in CAPTIONS]) for seed in range(8)]
    together = np.corrcoef([np.arange(len(CAPTIONS)), *ranks])
    assert np.abs(together - np.eye(9)).max() < 5 / np.sqrt(len(CAPTIONS))
    got = [int(x.split()[1]) for x in ordered(tmp_path, CAPTIONS)[0]]
    assert abs(np.corrcoef(got, np.arange(len(got)))[0, 1]) < 5 / np.sqrt(len(got))


def test_what_says_the_same_is_left_out(tmp_path):
    got, again = ordered(tmp_path, ["A cat.", "a dog", "a  CAT", "a CAT", "a cat!", "A DOG"])
    assert sorted(got) == ["A cat.", "a  CAT", "a dog"]  # blanks are the cleaning's affair
    assert sorted(x.caption for x in again) == ["A DOG", "a CAT", "a cat!"]
    assert {x.reason for x in again} == {"same caption"}


def test_equal_hashes_are_no_repetition(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_shuffle, "order_of", lambda caption, seed: 7)
    got, again = ordered(tmp_path, ["a cat", "a dog", "A CAT"])
    assert (got, [x.caption for x in again]) == (["a cat", "a dog"], ["A CAT"])


class Stopped(Exception):
    """What ends a process here."""


@pytest.mark.parametrize("seed", range(5))
def test_stopped_and_gone_on(tmp_path, monkeypatch, seed):
    """Wherever it stops, also between the appending to files and the note of it."""
    monkeypatch.setattr(caption_shuffle, "CHUNK", 100)
    sources = []
    for i in range(3):
        sources.append(tmp_path / f"{i}.txt")
        sources[i].write_text(
            "\n".join(f"{i} {x}" + "#" * (k % 7 == 0) for k, x in enumerate(CAPTIONS[:450]))
        )
    want = spread_texts(tmp_path / "apart", sources)
    draw, append = random.Random(seed), caption_shuffle.append

    def stopping(path, data):
        if draw.random() < 0.002:
            append(path, data[: len(data) // 2])
            raise Stopped
        return append(path, data)

    monkeypatch.setattr(caption_shuffle, "append", stopping)
    stops, got = 0, Progress()
    while not got.files:
        try:
            got = spread_texts(tmp_path / "stopped", sources)
        except Stopped:
            stops += 1
    assert stops and got == want
    for a, b in zip(parts(tmp_path / "apart"), parts(tmp_path / "stopped"), strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert (got.kept, got.left_out) == (3 * 385, {"marked": 3 * 65})


def test_a_folder_that_lacks_something_begins_anew(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n".join(CAPTIONS))
    want = spread_texts(tmp_path / "parts", [source])
    whole = {x.name: x.read_bytes() for x in parts(tmp_path / "parts")}
    with parts(tmp_path / "parts")[9].open("ab") as file:
        file.truncate(10)
    assert spread_texts(tmp_path / "parts", [source]) == want
    assert {x.name: x.read_bytes() for x in parts(tmp_path / "parts")} == whole


def test_lines_are_read_as_they_were_written(tmp_path):
    items = [Item('"猫"\u2028 \\ \x1c', "http://x"), Item("a", "")]
    (tmp_path / "a.jsonl").write_text("".join(map(to_line, items)), "utf-8")
    assert list(caption_shuffle.read_lines(tmp_path / "a.jsonl")) == items
    assert to_line(items[1]) == '{"caption": "a"}\n'
