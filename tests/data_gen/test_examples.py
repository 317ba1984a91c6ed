# SPDX-License-Identifier: Apache-2.0
"""Claims: the examples that ship are 60 clean triplets; no two are alike in caption, instruction or
result; each edit keeps something and changes something; instructions are varied."""

import itertools
from pathlib import Path

import pytest

from data_gen import prompt
from data_gen.caption_text import Bounds, clean, useless
from data_gen.near_duplicates import grams, similarity
from data_gen.triplet_checks import check
from data_gen.triplet_file import read_triplets, to_line
from data_gen.triplet_filter import Limits

FILE = Path(prompt.__file__).with_name("examples.jsonl")
TRIPLETS = read_triplets(FILE)


def most_alike(texts):
    """The two texts that are most alike, and how much."""
    pairs = itertools.combinations(texts, 2)
    return max((similarity(grams(a), grams(b)), a, b) for a, b in pairs)


def test_format():
    good, findings = check([FILE], Limits())
    assert len(good) == 60 and findings == []
    assert FILE.read_text("utf-8") == "".join(map(to_line, TRIPLETS))
    for text in itertools.chain.from_iterable(x[:3] for x in TRIPLETS):
        assert clean(text) == text and not useless(text, Bounds())
        assert text[-1] not in " ."


@pytest.mark.parametrize("field", ["input", "edit", "output"])
def test_no_two_are_alike(field):
    """Half of what near duplicates share is far above what any two of these do."""
    assert most_alike([getattr(x, field) for x in TRIPLETS])[0] < 0.25


def test_control_alike_ones_are_found():
    texts = ["Field of lavender in Provence", "Fields of lavender in the Provence", "A cat"]
    assert most_alike(texts)[0] > 0.5


def test_an_edit_keeps_something_and_changes_something():
    assert all(0.2 < similarity(grams(x.input), grams(x.output)) < 0.95 for x in TRIPLETS)


def test_variety():
    """Few instructions begin alike; some are questions, some are not in English."""
    firsts = [x.edit.split()[0].lower() for x in TRIPLETS]
    assert len(set(firsts)) >= 40 and max(map(firsts.count, firsts)) <= 5
    assert sum(x.edit.endswith("?") for x in TRIPLETS) >= 2
    assert sum(not x.edit.isascii() for x in TRIPLETS) >= 1
