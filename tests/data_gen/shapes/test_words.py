# SPDX-License-Identifier: Apache-2.0
"""Texts: captions name all that is not the default and fit the small tokenizer; instructions mean
one object; held-out wordings are new sentences of known words, and no training text has them."""

import random
import re
from collections import Counter

import pytest

from data_gen.shapes import words
from data_gen.shapes.edits import refer
from data_gen.shapes.examples import example
from data_gen.shapes.instructions import WORDINGS
from data_gen.shapes.scene import Object, Scene
from data_gen.tokenizer import learn

TRAINING = [example(i) for i in range(400)]
HELD_OUT = [example(i, held_out=True) for i in range(400)]


def test_captions_in_words():
    circle = Object("circle", "orange", "small", "striped", "left", 16.0, 32.0)
    heart = Object("heart", "red", "large", "plain", "right", 48.0, 32.0)
    scene = Scene((circle, heart), "white", "night")
    voice = words.Voice(0, 0, 0, 0, 0, 0, adjective=True, complete=False)
    assert words.caption(scene, voice) == (
        "a small striped orange circle on the left and a red heart on the right on a white "
        "background, at night"
    )
    other = voice._replace(frame=2, size=1, adjective=False, complete=True)
    assert words.caption(scene, other) == (
        "at night, a little orange circle with stripes on the left and a big plain red heart on "
        "the right on a white background"
    )


@pytest.mark.parametrize("examples", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_captions_name_everything_that_is_not_the_default(examples):
    for made in examples:
        pairs = (made.before, made.input_caption), (made.after, made.output_caption)
        for scene, caption in pairs:
            assert f"a {scene.background} background" in caption
            assert scene.style == "flat" or any(s in caption for s in words.STYLES[scene.style])
            counts = Counter(re.findall(r"\w+", caption))
            for size in ("small", "little", "tiny"):
                assert counts[size] in (0, sum(o.size == "small" for o in scene.objects))
            assert sum(counts[size] for size in words.SMALL) == sum(
                o.size == "small" for o in scene.objects
            )
            for o in scene.objects:
                assert re.search(rf"\b{o.colour} {o.shape}\b", caption)
                assert o.place == "centre" or any(p in caption for p in words.PLACES[o.place])
            for texture in ("striped", "dotted"):
                named = (*words.ADJECTIVES[texture], *words.NOUNS[texture])
                there = sum(o.texture == texture for o in scene.objects)
                assert sum(counts[word] for word in named) == there


def test_captions_of_an_edit_differ_in_the_edit_only():
    for made in TRAINING:
        if len(made.changes) == 1 and made.changes[0].kind == "recolour":
            first, second = made.input_caption.split(), made.output_caption.split()
            different = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
            articles = [pair for pair in different if set(pair) == {"a", "an"}]
            assert len(different) - len(articles) == 1


def test_articles():
    for made in (*TRAINING, *HELD_OUT):
        for text in (made.input_caption, made.instruction, made.output_caption):
            assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text


def test_texts_are_short():
    texts = [t for e in TRAINING for t in (e.input_caption, e.instruction, e.output_caption)]
    tokenizer = learn(texts, 1024)
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    assert max(lengths) <= 60
    assert sum(lengths) / len(lengths) < 25


def test_references_mean_one_object():
    rng = random.Random(0)
    for made in TRAINING:
        for o in made.before.objects:
            said = refer(rng, made.before, o, words.draw_voice(rng))
            meant = [
                other
                for other in made.before.objects
                if other.shape in said.split() or "shape" in said.split()
                if other.colour in said.split()
                or not set(said.split()) & {x.colour for x in made.before.objects}
                if other.place == o.place
                or not any(p in said for p in words.PLACES.get(o.place, ()))
            ]
            assert meant == [o], said


@pytest.mark.parametrize("key", WORDINGS)
def test_held_out_wordings_are_new_sentences_of_known_words(key):
    wordings = WORDINGS[key]
    known = {w for each in WORDINGS.values() for s in each.training for w in re.findall(r"\w+", s)}
    assert len(wordings.training) >= (4 if key == "joined" else 12)
    assert len(wordings.held_out) >= (2 if key == "joined" else 4)
    assert len({*wordings.training, *wordings.held_out}) == sum(map(len, wordings))
    for sentence in wordings.held_out:
        assert set(re.findall(r"\w+", sentence)) <= known, sentence


def test_no_wording_asks_for_two_edits():
    sentences = [
        sentence
        for key, wordings in WORDINGS.items()
        for sentence in {f.replace("values", "value") for f in sum(wordings, ())}
        if key not in ("joined",)
    ]
    shared = {s for s, count in Counter(sentences).items() if count > 1}
    colours_or_patterns = {
        "make {it} {value}", "turn {it} {value}", "{it} should be {value}", "let {it} be {value}"
    }  # told apart by the value alone  # fmt: skip
    assert shared <= colours_or_patterns


def test_training_says_nothing_that_is_held_out():
    assert not {e.instruction for e in TRAINING} & {e.instruction for e in HELD_OUT}
    patterns = {
        kind: [
            re.compile(re.sub(r"\\\{\w*\\\}", ".+", re.escape(wording)) + "$")
            for wording in wordings.held_out
        ]
        for kind, wordings in WORDINGS.items()
    }
    same = {"background", "night", "outlined", "shadowed", "not night"}
    for made in TRAINING:
        if len(made.changes) == 1 and made.changes[0].kind in same:
            kind = made.changes[0].kind
            assert not any(p.match(made.instruction) for p in patterns[kind]), made.instruction
