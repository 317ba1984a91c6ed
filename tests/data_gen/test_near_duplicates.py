# SPDX-License-Identifier: Apache-2.0
"""Claims: what is found are texts whose sets of four characters in a row are as similar as asked,
as comparing every pair finds them; case, punctuation and white space do not count.
"""

import random

import numpy as np
import pytest

from data_gen.near_duplicates import grams, near_duplicates, similarity

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def runs(text: str) -> set[str]:
    """The same sets, written down plainly, for texts of lower-case words."""
    padded = f" {text}    "
    return {padded[i : i + 4] for i in range(len(padded) - 3)}


def jaccard(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def texts(count: int) -> list[str]:
    """Random texts of 20 words; two thirds have some words of an earlier one changed."""
    draw, made = random.Random(0), []

    def word() -> str:
        return "".join(draw.choices(LETTERS, k=draw.randint(2, 8)))

    for i in range(count):
        words = [word() for _ in range(20)]
        if i % 3:
            words = made[draw.randrange(len(made))].split()
            for _ in range(draw.randint(0, 8)):
                words[draw.randrange(20)] = word()
        made.append(" ".join(words))
    return made


def every_pair(made: list[str], threshold: float) -> list[bool]:
    sets, found = [runs(text) for text in made], []
    for i, a in enumerate(sets):
        kept = (b for b, same in zip(sets[:i], found, strict=True) if not same)
        found.append(any(len(a & b) >= threshold * len(a | b) for b in kept))
    return found


@pytest.mark.parametrize("threshold", [0.8, 0.9, 1.0])
def test_the_same_as_comparing_every_pair(threshold):
    made = texts(300)
    found = near_duplicates(made, made.__getitem__, threshold).tolist()
    expected = every_pair(made, threshold)
    assert 20 < sum(expected) < 200
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= (
        0 if threshold > 0.8 else 1
    )


def test_similarity_is_jaccards():
    for a, b in zip(texts(50), texts(50)[1:], strict=False):
        assert similarity(grams(a), grams(b)) == pytest.approx(jaccard(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("A red car.", "a red car"),
        ("café —  noir!", "Café noir"),
        ("ｆｕｌｌ width", "full width"),
        ("STRASSE", "straße"),
    ],
)
def test_what_does_not_count(a, b):
    assert near_duplicates([a, "another text", b], [a, "", b].__getitem__, 1.0).tolist() == [
        False, False, True,
    ]  # fmt: skip


def test_one_letter_counts_and_so_does_a_script_without_spaces():
    made = ["雪中的猫在屋顶上睡觉", "雪中的狗在屋顶上睡觉", "雪中的猫在屋顶上睡觉。", "", "", "a"]
    found = near_duplicates(made, made.__getitem__, 1.0)
    assert found.tolist() == [False, False, True, False, True, False]


def test_of_a_thousand_alike_one_is_left():
    made = [f"the very same long text about a house by the sea {i % 2}" for i in range(1000)]
    found = near_duplicates(made, made.__getitem__, 0.8)
    assert np.flatnonzero(~found).tolist() == [0]
