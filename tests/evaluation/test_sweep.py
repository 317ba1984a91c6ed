# SPDX-License-Identifier: Apache-2.0
"""Claims: numbers are the same on any number of devices and beside any other example; over a grid
an example is encoded once; a later turn edits the result of the turn before.
"""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder
from ip2p_jax.evaluation.evaluation_run import Plan, missing, run
from ip2p_jax.evaluation.examples import ExampleSet, open_examples
from ip2p_jax.evaluation.methods import InstructPix2Pix, Recipe, Rows
from ip2p_jax.evaluation.scorer import Compared, open_scorer
from ip2p_jax.evaluation.sweep import Point, Shown, Sweep, cut, in_order
from ip2p_jax.placed import place
from ip2p_jax.weights.load import load
from tests.evaluation.layouts import SESSIONS, write_magicbrush

POINTS = [Point(7.5, 1.0), Point(7.5, 1.6)]
ORDER = [4, 0, 3, 5, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_magicbrush(tmp_path_factory.mktemp("sessions") / "test")


@pytest.fixture(scope="module")
def examples(folder) -> ExampleSet:
    """6 turns, each on its own."""
    return open_examples(folder)


def sweep_on(devices: list[Any], model: Path, clip: Path, examples: ExampleSet) -> Sweep:
    placed = place(load(str(model)), devices=devices)
    scorer = open_scorer(str(clip), devices=devices)
    method = InstructPix2Pix(placed, Recipe(steps=2))
    return Sweep(method, scorer, examples, Shown(16, "refuse"), rows=2)


@pytest.fixture(scope="module")
def sweep(tiny_ip2p, tiny_clip, examples) -> Sweep:
    """On one device."""
    return sweep_on(jax.devices()[:1], tiny_ip2p, tiny_clip, examples)


def of_set(sweep: Sweep, examples: ExampleSet) -> Sweep:
    """The same programs for other examples."""
    other = copy.copy(sweep)
    other.examples = examples
    return other


Made = dict[tuple[Point, int, int], tuple[dict[str, Any], np.ndarray]]
"""By point, turn and index: the line, and the picture."""


def make(sweep: Sweep, order: list[int], points: list[Point] = POINTS) -> Made:
    units, most = cut(order, sweep.rows), sweep.model.devices
    made: Made = {}
    for start in range(0, len(units), most):
        numbers = range(start, min(start + most, len(units)))
        batch = sweep.load(numbers, [units[n] for n in numbers])
        for result in sweep.results(batch, map(sweep.everywhere, points)):
            where = {index: row for row, _, index in sweep.places(batch)}
            for unit, line in sweep.lines(result):
                assert line["index"] in units[unit]
                point = Point(line["text_guidance"], line["image_guidance"])
                key = (point, line["turn"], line["index"])
                assert key not in made
                picture = result.turns[line["turn"] - 1].pictures[where[line["index"]]]
                made[key] = line, np.asarray(picture)
    return made


def assert_same(a: Made, b: Made) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for key, (line, picture) in a.items():
        assert line == b[key][0]
        np.testing.assert_array_equal(picture, b[key][1])


@pytest.fixture(scope="module")
def made(sweep) -> Made:
    return make(sweep, ORDER)


def test_rows_that_fill_up_do_not_appear(made):
    """Of 5 examples in units of 2 the last unit has a row too many."""
    assert set(made) == {(point, 1, index) for point in POINTS for index in ORDER}
    lines = [line for line, _ in made.values()]
    assert {line["kind"] for line in lines} == {"example"}
    names = {line["index"]: line["example"] for line in lines}
    assert names[1] == "139-output1" and names[5] == "2153-output2"
    assert len({line["clip_image"] for line in lines}) == 10


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers(made, tiny_ip2p, tiny_clip, examples):
    """3 units on 8 devices. Control: at another point all is different."""
    spread = sweep_on(jax.devices(), tiny_ip2p, tiny_clip, examples)
    assert spread.model.devices == 8
    assert_same(make(spread, ORDER), made)
    for index in ORDER:
        (one, a), (other, b) = (made[point, 1, index] for point in POINTS)
        assert np.any(a != b) and one["l1"] != other["l1"]


def test_an_example_is_the_same_beside_any_other(sweep, made):
    other = make(sweep, [1, 4, 3], POINTS[1:])
    assert_same(other, {key: made[key] for key in other})


def test_rows_may_have_points_of_their_own(sweep, made):
    batch = sweep.load([0], [[4, 0]])
    [result] = sweep.results(batch, [np.array(POINTS)])
    for point, (_, line), picture in zip(
        POINTS, sweep.lines(result), np.asarray(result.turns[0].pictures), strict=True
    ):
        want, wanted = made[point, 1, line["index"]]
        assert line == want
        np.testing.assert_array_equal(picture, wanted)


def test_an_example_is_encoded_once_over_a_grid(sweep, tmp_path):
    """And not at all where nothing is missing. Control: a run for each point encodes as often."""
    counted, encoded, edited = copy.copy(sweep), Counter(), Counter()

    def prepare(params, scorers, rows):
        encoded.update(np.asarray(rows.index).tolist())
        return sweep.prepare(params, scorers, rows)

    def step(*args):
        *_, values, _ = args
        edited.update(zip(*(np.asarray(x).tolist() for x in values), strict=True))
        return sweep.step(*args)

    counted.prepare, counted.step = prepare, step
    points = [Point(s, round(i, 1)) for s in (5.0, 7.5) for i in (1.0, 1.6, 2.2)]

    def evaluate(path: Path, points: list[Point]) -> int:
        folder = EvaluationFolder(epath.Path(path), "image_guidance")
        plan = Plan(range(6), points, 2, pictures=0)
        todo = missing(folder, plan, range(3))
        return sum(run(counted, folder, plan, todo))

    assert evaluate(tmp_path / "grid", points) == 36
    assert encoded == dict.fromkeys(range(6), 1)
    assert len(edited) == 6 and set(edited.values()) == {6}
    assert evaluate(tmp_path / "grid", points) == 0
    assert encoded == dict.fromkeys(range(6), 1)
    for point in points:
        evaluate(tmp_path / "single", [point])
    assert encoded == dict.fromkeys(range(6), 7)


def test_a_picture_that_does_not_decode_is_skipped(sweep, made, tmp_path):
    """It is the target of one turn and the input of the next; the others do not change."""
    folder = write_magicbrush(tmp_path / "test")
    broken = folder / "images" / "139" / "139-output1.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    got = make(of_set(sweep, open_examples(folder)), ORDER)
    assert got.keys() == made.keys()
    for (_, _, index), (line, _) in got.items():
        if index == 1:
            assert line["kind"] == "skipped" and not set(line) & {"clip_image", "l1"}
            assert line["reason"].startswith("139-output1: the target: ")
    assert_same(*({key: x[key] for key in x if key[2] != 1} for x in (got, made)))
    both = make(of_set(sweep, open_examples(folder)), [2, 1], POINTS[:1])
    assert [line["kind"] for line, _ in both.values()] == ["skipped"] * 2


@pytest.fixture(scope="module")
def sessions(sweep, folder) -> Sweep:
    """3 sessions of 1, 3 and 2 turns."""
    return of_set(sweep, open_examples(folder, turns="multi"))


def test_a_session_has_a_line_a_turn(sessions, made):
    got = make(sessions, [2, 1, 0], POINTS[:1])
    turns = {(i, k + 1) for i, count in enumerate(SESSIONS.values()) for k in range(count)}
    assert {(index, turn) for _, turn, index in got} == turns
    key = (POINTS[0], 1, 0)  # a session of one turn is that turn, but for its name
    (line, picture), (wanted, want) = got[key], made[key]
    assert line == wanted | {"example": "242679"}
    np.testing.assert_array_equal(picture, want)


def test_a_later_turn_edits_the_result_of_the_turn_before(sweep, sessions):
    """Control: from the true picture, which the set has, it is another edit."""
    batch = sessions.load([0], [[1, 2]])
    [result] = sessions.results(batch, [sessions.everywhere(POINTS[0])])
    first, second, _ = (np.asarray(turn.pictures) for turn in result.turns)
    example = batch.examples[1]
    texts = [batch.examples[i].turns[1] for i in (1, 2)]
    truth = np.stack([list(sessions.pictures(batch.examples[i]))[1] for i in (1, 2)])

    def edit(images: np.ndarray) -> np.ndarray:
        tokens = sweep.model.tokenize([turn.instruction for turn in texts])
        rows = Rows(images, tokens, np.array([1, 2], np.uint32), np.array([1, 1], np.uint32))
        compared = Compared(images, sweep.captions(texts))
        again = batch._replace(turns=[(rows, compared)])
        [edited] = sweep.results(again, [sweep.everywhere(POINTS[0])])
        return np.asarray(edited.turns[0].pictures)

    assert len(example.turns) == 3
    np.testing.assert_array_equal(edit(first), second)
    assert np.all(np.any(edit(truth) != second, axis=(1, 2, 3)))
    lines = [x for _, x in sessions.lines(result) if (x["index"], x["turn"]) == (1, 2)]
    given = abs(second[0].astype(float) - first[0]).mean() / 255
    assert lines[0]["l1_input"] == pytest.approx(given, rel=1e-5)


def test_targets_are_embedded_once_a_turn(sessions):
    """Over all points, whose results are the inputs of the next turn."""
    counted, calls = copy.copy(sessions), Counter()

    def count(name: str):
        def call(*args):
            calls[name] += 1
            return getattr(sessions, name)(*args)

        return call

    counted.refer, counted.prepare = count("refer"), count("prepare")
    batch = counted.load([0], [[1, 2]])
    [one, other] = counted.results(batch, map(counted.everywhere, POINTS))
    assert calls == {"refer": 3, "prepare": 1 + 2 * 2}
    scores = [np.asarray(x.turns[2].scores["clip_target"]) for x in (one, other)]
    assert np.all(scores[0] != scores[1])


def test_more_samples_begin_with_the_same():
    order = in_order(100, None, 3)
    assert sorted(order) == list(range(100)) != order
    for samples in (1, 7, 100, 200):
        assert in_order(100, samples, 3) == order[:samples]
        assert cut(order, 8)[: samples // 8] == cut(order[:samples], 8)[: samples // 8]
    assert in_order(100, None, 4) != order
