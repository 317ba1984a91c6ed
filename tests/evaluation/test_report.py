# SPDX-License-Identifier: Apache-2.0
"""Claims: points are means with their intervals, whatever is missing; the table holds them and no
empty column; a broken metrics.jsonl is one line that names file and line."""

import json
import random

import numpy as np
import pytest

from ip2p_jax.evaluation.bootstrap import interval
from ip2p_jax.evaluation.columns import SCORES, SETTINGS
from ip2p_jax.evaluation.report import points, read_metrics, table
from tests.evaluation.rows import draws, example, ours, point, sdedit


def test_points_are_means_with_intervals():
    rows = draws(40, ["clip_image", "clip_direction"], image_guidance=1.0)
    rows += draws(30, ["clip_image", "clip_direction"], seed=1, image_guidance=2.0)
    first, second = points(rows)
    assert list(first)[:6] == [
        "kind",
        "method",
        "turn",
        "text_guidance",
        "image_guidance",
        "examples",
    ]
    assert (first["kind"], first["image_guidance"], first["examples"]) == ("point", 1.0, 40)
    assert (second["image_guidance"], second["examples"]) == (2.0, 30)
    for found, group in ((first, rows[:40]), (second, rows[40:])):
        for name in ("clip_image", "clip_direction"):
            values = np.array([row[name] for row in group])
            got = [found[name], found[f"{name}_low"], found[f"{name}_high"]]
            np.testing.assert_allclose(got, [values.mean(), *interval(values)], rtol=1e-12)
    assert set(first) - set(SETTINGS) == {"kind", "examples"} | {
        f"{name}{end}" for name in ("clip_image", "clip_direction") for end in ("", "_low", "_high")
    }


def test_points_do_not_depend_on_the_order_of_lines():
    rows = draws(40, ["clip_image", "l1"]) + draws(40, ["clip_image", "l1"], turn=2)
    rows += [example(i, l1=0.5) | {"method": "sdedit", "strength": 0.5} for i in range(3)]
    for row in rows[-3:]:
        del row["image_guidance"]
    mixed = rows + [{"kind": "skipped", **example(99, reason="no picture")} | {"kind": "skipped"}]
    random.Random(0).shuffle(mixed)
    want = points(rows)
    assert json.dumps(points([*mixed, *want])) == json.dumps(want)
    assert [(p["method"], p["turn"], p["examples"]) for p in want] == [
        ("ip2p", 1, 40),
        ("ip2p", 2, 40),
        ("sdedit", 1, 3),
    ]


def test_points_hold_no_nan():
    """A value that is missing or not finite is not in the mean, and the point says so."""
    rows = [example(i, clip_image=0.5, psnr=20.0 + i, ssim=float("nan")) for i in range(4)]
    rows[1]["psnr"] = float("inf")
    del rows[2]["psnr"]
    (found,) = points(rows)
    json.dumps(found, allow_nan=False)
    assert (found["psnr"], found["psnr_examples"]) == (21.5, 2)
    assert (found["psnr_low"], found["psnr_high"]) == (20.0, 23.0)
    assert found["examples"] == 4 and "clip_image_examples" not in found and "ssim" not in found
    assert points([]) == []


def test_an_example_twice():
    with pytest.raises(ValueError, match="example 3 is twice at method ip2p, turn 1, text_gui"):
        points([example(3), example(4), example(3)])
    assert len(points([example(3), example(3, turn=2)])) == 2


def columns(text: str) -> dict[str, list[str]]:
    """A markdown table's cells by the title of their column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    assert all(set(x) == {"-"} for x in rule)
    return dict(zip(head, map(list, zip(*rows, strict=True)), strict=True))


def test_table():
    """A row a point, mean and interval; settings and scores only where a point has them."""
    text = table([*sdedit()[:1], *ours()])
    got = columns(text)
    assert list(got) == [
        "method",
        "text guidance",
        "image guidance",
        "strength",
        "examples",
        "CLIP directional similarity ↑",
        "CLIP image similarity ↑",
    ]
    assert got["method"] == ["ip2p"] * 3 + ["sdedit"]
    assert got["image guidance"] == ["1", "1.4", "2.2", ""]
    assert got["strength"] == ["", "", "", "0.3"]
    assert got["CLIP image similarity ↑"][0] == "0.700 [0.680, 0.720]"
    assert "95% bootstrap interval" in text and "↓ lower is better" in text
    for name in ("clip_direction", "clip_image"):
        assert f"**{SCORES[name].title} ↑**: {SCORES[name].meaning}" in text
    assert text.count("- **") == 2  # others are not spoken of
    assert "turn" in columns(table([*ours(), point("ip2p", 1.0, 0.1, 0.5, turn=2)]))


def test_table_of_what_some_have():
    """Scores with another sense, with other decimals, and of a part of the examples only."""
    rows = [example(i, psnr=20.0 + i, l1=0.123456) for i in range(4)]
    del rows[3]["psnr"]
    text = table([*points(rows), *sdedit()])
    got = columns(text)
    assert got["PSNR ↑"] == ["21.00 [20.00, 22.00] (n 3)", "", "", ""]
    assert got["L1 ↓"] == ["0.1235 [0.1235, 0.1235]", "", "", ""]
    assert "(n 99): the mean of these 99 examples only" in text
    assert "(n 99)" not in table(ours()) and "examples" in table([])


def test_every_score_has_its_sense():
    """What is a distance is better low, what is a likeness high."""
    low = {name for name, score in SCORES.items() if not score.higher}
    assert low == {f"{name}{of}" for name in ("l1", "l2", "lpips") for of in ("", "_input")}
    assert len({score.title for score in SCORES.values()}) == len(SCORES) == 16


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_read_metrics(tmp_path):
    """What was written; an example's PSNR may be infinite, as `points` knows."""
    rows = [example(0, psnr=float("inf"), clip_image=1), *ours(), *sdedit()]
    rows.append(example(1, reason="no picture") | {"kind": "skipped"})
    assert read_metrics(write(tmp_path / "metrics.jsonl", rows)) == rows
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert read_metrics(tmp_path / "empty.jsonl") == []


def without(name: str) -> dict:
    return {key: x for key, x in ours()[0].items() if key != name}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "point", "meth', "not JSON (Unterminated string starting at, column 19)"),
        ("[1, 2]", "expected a JSON object"),
        ({"step": 1, "loss": 0.5}, "kind is None, expected one of example, skipped, point"),
        ({"kind": ["point"]}, "kind is ['point'], expected one of example, skipped, point"),
        (without("text_guidance"), "text_guidance is missing"),
        (without("examples"), "examples is missing"),
        (without("image_guidance"), "expected either image_guidance or strength"),
        (without("clip_image_low"), "clip_image_low is missing"),
        (ours()[0] | {"strength": 0.5}, "expected either image_guidance or strength"),
        (ours()[0] | {"method": 3}, "method: 3, expected a text"),
        (ours()[0] | {"turn": None}, "turn: None, expected a finite number"),
        (ours()[0] | {"text_guidance": True}, "text_guidance: True, expected a finite number"),
        (ours()[0] | {"clip_image": float("nan")}, "clip_image: nan, expected a finite number"),
        (example(1, clip_image="high"), "clip_image: 'high', expected a number"),
        (example(1) | {"index": float("inf")}, "index: inf, expected a finite number"),
        (ours()[2], "a second point of method ip2p, turn 1, text_guidance 7.5, image_guidance 2.2"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_broken_lines(tmp_path, line, message):
    file = tmp_path / "metrics.jsonl"
    write(file, [example(0, l1=0.5), *ours()])
    with file.open("a") as f:
        f.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError) as error:
        read_metrics(file)
    assert str(error.value).startswith(f"{file}, line 5: {message}")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a folder, expected the metrics.jsonl of an evaluation"):
        read_metrics(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary: not a text in UTF-8"):
        read_metrics(tmp_path / "binary")
