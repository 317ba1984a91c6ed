# SPDX-License-Identifier: Apache-2.0
"""Claims: words find their tokens, and captions their alignment, as an independent script says."""

import numpy as np
import pytest

from data_gen.words import (
    align,
    equalizer,
    refinement,
    replacement,
    tokens_of,
    windows,
    word_mask,
    word_tokens,
)
from tests.data_gen.pair_cases import ADDED, CAPTIONS, CASES, STEPS, tokenizer
from tests.data_gen.test_prompt_to_prompt_golden import GOLDEN


@pytest.fixture(scope="module")
def clip():
    return tokenizer()


@pytest.mark.parametrize("name", CAPTIONS)
def test_replacement_is_the_golden_one(clip, name):
    first, second = CAPTIONS[name]
    mapper, aligned = replacement(first, second, clip)
    assert np.array_equal(mapper, GOLDEN[f"swap/{name}"])
    assert (aligned == 1).all()
    for x, y in zip(word_tokens(first, clip), word_tokens(second, clip), strict=True):
        assert np.allclose(mapper[x].sum(), len(x)) or not y  # no attention of a word is lost
        assert np.allclose(mapper[:, y].sum(), len(x)) or not x


def test_replacement_with_another_number_of_tokens(clip):
    """Each token of `rhinoceros` gets an equal share; what follows is shifted, not mispaired."""
    first, second = "a cat runs", "a rhinoceros runs"
    (cat,), rhinoceros = tokens_of(first, "cat", clip), tokens_of(second, "rhinoceros", clip)
    mapper, _ = replacement(first, second, clip)
    assert len(rhinoceros) > 1
    assert np.allclose(mapper[cat, rhinoceros], 1 / len(rhinoceros))
    assert mapper[tokens_of(first, "runs", clip), tokens_of(second, "runs", clip)] == 1
    back, _ = replacement(second, first, clip)
    assert (back[rhinoceros, cat] == 1).all()


@pytest.mark.parametrize("name", CAPTIONS | ADDED)
def test_refinement_is_the_golden_one(clip, name):
    first, second = (CAPTIONS | ADDED)[name]
    mapper, aligned = refinement(first, second, clip)
    assert np.array_equal(mapper, GOLDEN[f"mapper/{name}"])
    assert np.array_equal(aligned, GOLDEN[f"aligned/{name}"])
    assert np.array_equal(mapper.sum(0), aligned)  # one source each, or none


def test_control_goldens_tell_captions_apart(clip):
    made = {name: refinement(*captions, clip).mapper for name, captions in ADDED.items()}
    for name, mapper in made.items():
        for other in ADDED:
            assert np.array_equal(mapper, GOLDEN[f"mapper/{other}"]) == (name == other)


def test_alignment_is_the_best_one():
    """Against all alignments of short sequences."""

    def best(x, y):
        if not x or not y:
            return 0
        return max(best(x[1:], y), best(x, y[1:]), best(x[1:], y[1:]) + (1 if x[0] == y[0] else -1))

    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y = (rng.integers(0, 3, rng.integers(0, 7)).tolist() for _ in range(2))
        places = align(x, y)
        pairs = [(i, j) for j, i in enumerate(places) if i is not None]
        assert all(x[i] == y[j] for i, j in pairs)
        assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})
        assert len(pairs) == best(x, y)
    assert align([7, 8], [7, 9, 7, 8, 8]) == [0, None, None, 1, None]  # the earliest are paired


@pytest.mark.parametrize("name", CASES)
def test_windows_and_scales_are_the_golden_ones(clip, name):
    case = CASES[name]
    made = windows(case.second, STEPS, clip, case.default, case.words)
    assert np.array_equal(made, GOLDEN[f"windows/{name}"])
    assert np.array_equal(equalizer(case.second, case.scales, clip), GOLDEN[f"equalizer/{name}"])


def test_a_word_has_its_own_window(clip):
    made = windows("a dog on a mat", 10, clip, (0.2, 1.0), {"dog": (0.0, 0.3)})
    (dog,) = tokens_of("a dog on a mat", "dog", clip)
    assert np.flatnonzero(made[:, dog]).tolist() == [0, 1, 2]
    others = np.delete(made, dog, axis=1)
    assert np.array_equal(others, np.repeat(np.arange(10)[:, None] >= 2, 76, 1))


def test_words_are_found(clip):
    caption = "The cat, a  Cat; one catfish (cat-like!) - naïve 東京 it's 1998"
    assert [clip.convert_ids_to_tokens(clip(caption).input_ids)[i] for i in (2, 5, 9)] == [
        "cat</w>",
        "cat</w>",
        "(</w>",
    ]
    assert tokens_of(caption, "cat", clip) == tokens_of(caption, "Cat", clip) == [2, 5, 10]
    assert tokens_of(caption, "cat,", clip) == [2, 3]
    mask = word_mask(caption, ["cat", "one"], clip)
    assert mask.shape == (77,)
    assert np.flatnonzero(mask).tolist() == [2, 5, 7, 10]


def test_words_by_themselves_have_the_same_tokens(clip):
    caption = "Rock'n'roll,  (well-behaved) naïve 東京 🙂👍🏽 don't 1998 ...cat--dog <b>\u00a0end."
    ids = clip(caption).input_ids
    places = word_tokens(caption, clip)
    assert [i for word in places for i in word] == [*range(1, len(ids) - 1)]
    for word, of_word in zip(caption.split(), places, strict=True):
        assert [ids[i] for i in of_word] == clip(word).input_ids[1:-1]


def test_bad_words_are_named(clip):
    with pytest.raises(ValueError, match="the word 'dog' is not in the caption 'a cat'"):
        tokens_of("a cat", "dog", clip)
    with pytest.raises(ValueError, match="is not in the caption"):
        tokens_of("a " * 80 + "cat", "cat", clip)  # cut off
    with pytest.raises(ValueError, match="equally many words: 2 in 'a cat', 3 in 'a big cat'"):
        replacement("a cat", "a big cat", clip)
