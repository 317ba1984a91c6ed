# SPDX-License-Identifier: Apache-2.0
"""Claims: what is decided on triplets is kept at once and for good, the file of what is kept holds
exactly that, and nothing wrong gets into it.
"""

import json
import os

import pytest

from data_gen.review import Review
from data_gen.triplet_file import Triplet, read_triplets

ROWS = [
    {"input": "a cat", "edit": "make it a dog", "output": "a dog"},
    {
        "caption": "a street",
        "edit": "make it winter",
        "output": "a street in snow",
        "url": "http://x",
    },
    {"input": "a house", "edit": "paint it red", "output": "a  red house"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "triplets.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in ROWS), "utf-8")
    return path


@pytest.fixture
def opened():
    """Opens reviews, and closes what is open at the end."""
    reviews = []

    def opened(file, *captions) -> Review:
        """The review of a file, read from the disk."""
        while reviews:
            reviews.pop().close()
        reviews.append(Review(file, captions))
        return reviews[0]

    yield opened
    for review in reviews:
        review.close()


@pytest.fixture
def review(opened, file):
    return opened(file)


def test_browse_accept_correct_reject(review, opened):
    assert [review.look(i).triplet.edit for i in range(len(review))] == [x["edit"] for x in ROWS]
    assert review.accept(0, "a cat", "make it a dog", "a dog").what == "accepted"
    assert review.accept(1, "a street", "make it snow", "a street  in snow ").what == "corrected"
    assert review.reject(2).what == "rejected"
    kept = [Triplet("a cat", "make it a dog", "a dog")]
    kept.append(Triplet("a street", "make it snow", "a street in snow", "http://x"))
    assert read_triplets(review.kept) == kept
    review = opened(review.file)
    assert review.look(1).triplet == kept[1] and review.look(2).what == "rejected"
    assert review.counts() == {"accepted": 1, "corrected": 1, "rejected": 1, "written": 0}
    assert review.undecided(0) is None
    review.accept(2, "a house", "paint it red", "a red house")
    review.reject(0)
    assert review.look(2).what == "accepted", "white space is no correction"
    assert [x.edit for x in read_triplets(review.kept)] == ["make it snow", "paint it red"]


def test_write_by_hand(tmp_path, opened):
    """From nothing, and for captions that are given."""
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"caption": "a lake", "url": "http://lake"}\n{"caption": "a hill"}\n')
    review = opened(tmp_path / "hand.jsonl", captions)
    assert len(review) == 2 and review.look(0).triplet == Triplet("a lake", "", "", "http://lake")
    assert review.accept(0, "a lake", "let it freeze", "a frozen lake").what == "written"
    assert len(review) == 2
    assert review.accept(None, "a cat", "make it a dog", "a dog").what == "written"
    assert review.accept(None, "a hen", "make it a fox", "a fox").what == "written"
    review = opened(review.file, captions)
    assert len(review) == 4 and review.undecided(3) == 1
    assert review.look(2).triplet.input == "a cat"
    review.accept(2, "a cat", "make it a big dog", "a big dog")
    review.reject(3)
    review = opened(review.file, captions)
    assert len(review) == 4
    kept = read_triplets(review.kept)
    assert kept[0].url == "http://lake" and len(kept) == 2
    assert kept[1] == Triplet("a cat", "make it a big dog", "a big dog")


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (("a cat", " ", "a dog"), "the instruction is empty"),
        (("", "x", "a dog"), "the caption is empty"),
        (("a cat", "do nothing", "A cat."), "the edited caption is the caption"),
        (("a cat", "x" * 300, "a dog"), "the instruction is too short or too long"),
    ],
)
def test_what_is_wrong_is_not_saved(review, texts, error):
    for place in (0, None):
        with pytest.raises(ValueError, match=error):
            review.accept(place, *texts)
    assert review.undecided(-1) == 0 and not review.kept.exists()


def test_a_decision_that_was_half_written_is_undecided(review, opened):
    for place in range(3):
        texts = review.look(place).triplet[:3]
        review.accept(place, *texts)
    os.truncate(review.log.path, review.log.path.stat().st_size - 5)
    review = opened(review.file)
    assert review.undecided(-1) == 2
    review.reject(2)
    assert len(read_triplets(review.kept)) == 2


def test_one_page_at_a_time_and_wrong_files(review, file, tmp_path):
    with pytest.raises(ValueError, match="triplets.review.jsonl: another process is writing it"):
        Review(file)
    (tmp_path / "wrong.jsonl").write_text('{"input": "a"}\n')
    with pytest.raises(ValueError, match='wrong.jsonl, line 1: no "edit"'):
        Review(tmp_path / "wrong.jsonl")
