# SPDX-License-Identifier: Apache-2.0
"""Claims: a search finds the known best of a smooth trade-off within its budget, goes on where it
was stopped as if it had not been, and its account says what it bought.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from ip2p_jax.evaluation import search
from ip2p_jax.evaluation.bootstrap import interval
from ip2p_jax.evaluation.evaluation_folder import EvaluationFolder
from ip2p_jax.evaluation.evaluation_run import Plan
from ip2p_jax.evaluation.examples import open_examples
from ip2p_jax.evaluation.methods import InstructPix2Pix, Recipe
from ip2p_jax.evaluation.scorer import open_scorer
from ip2p_jax.evaluation.search import BOUNDS, DEFAULT, MOST, Found, Judged, best, compass, resume
from ip2p_jax.evaluation.sweep import Point, Shown, Sweep
from ip2p_jax.placed import place
from ip2p_jax.weights.load import load
from tests.evaluation.layouts import write_magicbrush

FLOOR = 0.8
BUDGET = 4


def trade_off(point: Point) -> Judged:
    """More text guidance changes more and keeps less, more image guidance the other way round: the
    best is where both are high, and enough is just kept."""
    s_t, s_i = point
    direction = 0.25 * (1 - math.exp(-s_t / 6)) - 0.03 * (s_i - 1.5)
    return Judged(direction, 0.82 - 0.02 * (s_t - 7.5) + 0.3 * math.log(s_i / 1.5))


def peak(point: Point) -> Judged:
    """Best at (10.3, 1.85), where enough is kept."""
    s_t, s_i = point
    return Judged(0.3 - 0.01 * (s_t - 10.3) ** 2 - 0.5 * (s_i - 1.85) ** 2, 0.9)


def far(point: Point) -> Judged:
    """Too little is kept at the usual scales: enough from s_I = 2.4 on."""
    s_t, s_i = point
    return Judged(0.1 - 0.05 * s_i + 0.001 * s_t, 0.8 + 0.1 * (s_i - 2.4))


def searched(
    judge: Callable[[Point], Judged], count: int, floor: float = FLOOR
) -> list[tuple[Point, Judged]]:
    """What a search of so many points has been told."""
    run, history = compass(floor), []
    point = next(run)
    for _ in range(count):
        history.append((point, judge(point)))
        point = run.send(history[-1][1])
    return history


def grid() -> Iterator[Point]:
    for s_t, s_i in itertools.product(*(np.linspace(*bound, 141) for bound in BOUNDS)):
        yield Point(float(s_t), float(s_i))


def short_of(judge: Callable[[Point], Judged], count: int) -> float:
    """By how much so many evaluations miss the best of 141 x 141 points."""
    ideal = max((judge(p) for p in grid() if judge(p).image >= FLOOR), key=lambda j: j.direction)
    _, found = best(searched(judge, count), FLOOR)
    return ideal.direction - found.direction if found.image >= FLOOR else math.inf


@pytest.mark.parametrize("judge", [trade_off, peak, far])
def test_it_comes_near_the_best_within_its_budget(judge):
    """Of 12 evaluations, as the command has it. Control: a third of them do not."""
    assert short_of(judge, 12) < 0.01 < short_of(judge, 4)


def test_control_one_scale_at_a_time(monkeypatch):
    """Then the floor stops both, however many evaluations there are."""
    monkeypatch.setattr(search, "DIRECTIONS", search.DIRECTIONS[:4])
    assert short_of(trade_off, 24) > 0.015


def test_the_peak_is_found_itself():
    point, _ = best(searched(peak, MOST), FLOOR)
    assert np.allclose(point, (10.3, 1.85), atol=(0.2, 0.05))


def always(point: Point) -> Judged:
    """Nothing is better than anything."""
    return Judged(0.1, 0.9)


def corner(point: Point) -> Judged:
    return Judged(point.text_guidance + point.other, 0.9)


@pytest.mark.parametrize("judge", [trade_off, peak, far, always, corner])
def test_no_point_twice_and_none_outside(judge):
    """Up to the largest budget, from where steps are so small that points would repeat."""
    points = [point for point, _ in searched(judge, MOST)]
    assert points[0] == DEFAULT == (7.5, 1.5)
    assert len(set(points)) == MOST
    for values, (low, high) in zip(zip(*points, strict=True), BOUNDS, strict=True):
        assert low <= min(values) and max(values) <= high


@pytest.mark.parametrize("judge", [trade_off, peak, far])
def test_resumed_it_goes_on_as_before(judge):
    history = searched(judge, 15)
    for told in range(15):
        run, point = resume(history[:told], FLOOR)
        for entry in history[told:]:
            assert point == entry[0]
            point = run.send(entry[1])
    swapped = [history[0], history[2], history[1]]
    with pytest.raises(ValueError, match="found .* where the search had"):
        resume(swapped, FLOOR)


def test_the_usual_scales_are_best_among_equals():
    assert best(searched(always, 10), FLOOR)[0] == DEFAULT
    history = [(DEFAULT, Judged(0.1, 0.7)), (Point(1, 1), Judged(0.9, 0.7))]
    assert best(history, FLOOR)[0] == DEFAULT  # none keeps enough, and both as much
    assert best(history, 0.6)[0] == Point(1, 1)


def test_what_is_better():
    """Enough kept comes first, then change; below the floor what is kept alone."""
    order = [Judged(*x) for x in ((0.9, 0.5), (-1, 0.7), (0.1, 0.8), (0.2, 0.8), (0.3, 0.9))]
    for (i, a), (k, b) in itertools.product(enumerate(order), repeat=2):
        assert a.better(b, FLOOR) == (i > k)


def test_the_account_says_what_was_bought():
    """Numbers counted by hand: means, differences, and how many keep enough."""
    found = [
        Found(0, "a", Point(10.0, 1.5), Judged(0.3, 0.85), Judged(0.1, 0.9)),
        Found(1, "b", Point(5.0, 1.75), Judged(0.2, 0.8), Judged(0.2, 0.6)),
        Found(2, "c", Point(7.5, 1.5), Judged(0.4, 0.7), Judged(0.4, 0.7)),
    ]
    lines = search.account(found, FLOOR, 12).splitlines()
    assert "at least 0.8, 12 evaluations, 3 examples" in lines[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:7]]
    usual, bought = cells[0], cells[2]
    assert usual[:3] == ["usual", "7.5", "1.5"] and usual[5] == "33%"
    assert usual[3].startswith("0.233 [") and usual[4].startswith("0.733 [")
    assert cells[1][:3] == ["found, by example (medians)", "7.5", "1.5"] and cells[1][5] == "67%"
    assert cells[1][3].startswith("0.300 [") and cells[1][4].startswith("0.783 [")
    low, high = interval(np.array([0.2, 0.0, 0.0]))
    assert bought[3] == f"0.067 [{low:.3f}, {high:.3f}]" and bought[4].startswith("0.050 [")
    for_set = [f._replace(point=Point(10.0, 1.25)) for f in found]
    assert "| found | 10 | 1.25 |" in search.account(for_set, FLOOR, 12)
    row = search.rows(found, "image_guidance")[1]
    assert row == {
        "index": 1,
        "example": "b",
        "text_guidance": 5.0,
        "image_guidance": 1.75,
        "clip_direction": 0.2,
        "clip_image": 0.8,
        "clip_direction_default": 0.2,
        "clip_image_default": 0.6,
    }


@pytest.fixture(scope="module")
def sweep(tiny_ip2p, tiny_clip, tmp_path_factory) -> Sweep:
    """Of 6 turns, one of which cannot be read."""
    folder = write_magicbrush(tmp_path_factory.mktemp("sessions") / "test")
    broken = folder / "images" / "242679" / "242679-input.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    one = jax.devices()[:1]
    method = InstructPix2Pix(place(load(str(tiny_ip2p)), devices=one), Recipe(steps=2))
    scorer = open_scorer(str(tiny_clip), devices=one)
    return Sweep(method, scorer, open_examples(folder), Shown(16, "refuse"), rows=2)


def plan(count: int) -> Plan:
    return Plan([4, 0, 3, 5, 1, 2][:count], [], rows=2, pictures=0)


def open_folder(path: Path) -> EvaluationFolder:
    return EvaluationFolder(epath.Path(path), "image_guidance")


def content(folder: EvaluationFolder) -> dict[str, bytes]:
    return {unit.name: unit.read_bytes() for unit in (folder.path / "units").iterdir()}


MODES = {
    "set": (search.search_set, search.found_for_set),
    "examples": (search.search_examples, search.found_for_examples),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_search_that_was_stopped_goes_on(mode, sweep, tmp_path):
    """After any number of writes, after part of the budget, with more examples: the same result.

    The model is a random one, so that the floor is met by some examples and points only.
    """
    find, found_for = MODES[mode]
    whole = open_folder(tmp_path / "whole")
    lost = (BUDGET - 1) * (mode == "examples")  # one cannot be read: it is not tried again
    assert sum(find(sweep, whole, plan(5), FLOOR, BUDGET)) == 5 * BUDGET - lost
    want = found_for(whole, plan(5), FLOOR, BUDGET)
    assert [f.number for f in want] == [1, 3, 4, 5] and len({f.found for f in want}) > 1
    for stop in (1, 3, 4, 7):
        part = open_folder(tmp_path / f"stopped{stop}")
        list(itertools.islice(find(sweep, part, plan(5), FLOOR, BUDGET), stop))
        list(find(sweep, part, plan(5), FLOOR, BUDGET))
        assert content(part) == content(whole)
    part = open_folder(tmp_path / "budget")
    list(find(sweep, part, plan(5), FLOOR, 2))
    assert found_for(part, plan(5), FLOOR, 2) != want
    list(find(sweep, part, plan(5), FLOOR, BUDGET))
    assert content(part) == content(whole)
    assert list(find(sweep, part, plan(5), FLOOR, BUDGET)) == []
    assert found_for(part, plan(5), FLOOR, BUDGET) == want
    list(find(sweep, part, plan(6), FLOOR, BUDGET))  # more examples, then fewer
    assert len(found_for(part, plan(6), FLOOR, BUDGET)) == 5
    assert found_for(part, plan(5), FLOOR, BUDGET) == want


def test_each_example_gets_its_own_points(sweep, tmp_path):
    """And they are those that its own scores lead to."""
    folder = open_folder(tmp_path)
    list(search.search_examples(sweep, folder, plan(6), FLOOR, BUDGET))
    lines = [json.loads(x) for n in range(3) for x in folder.unit(n).read_text().splitlines()]
    paths = set()
    for index in range(1, 6):
        history = search.history_of(folder, lines, index)
        assert len(history) == BUDGET
        resume(history, FLOOR)
        paths.add(tuple(point for point, _ in history))
    assert len(paths) > 1
    assert sum(line["kind"] == "skipped" for line in lines) == 1


def test_nothing_to_search_by(sweep, tmp_path):
    """The only example cannot be read."""
    only = Plan([0], [], rows=2, pictures=0)
    for mode, (find, found_for) in MODES.items():
        folder = open_folder(tmp_path / mode)
        with pytest.raises(ValueError, match="no example could be read"):
            list(find(sweep, folder, only, FLOOR, 2))
            found_for(folder, only, FLOOR, 2)
