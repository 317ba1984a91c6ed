# SPDX-License-Identifier: Apache-2.0
"""Claims: every public layout gives its pictures and texts, in its order, one example at a time;
sessions chain, single turns start from the truth; pictures become squares as asked; what is wrong
with a set is one line, found from headers alone. `layouts` says how the layouts are known.
"""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.data import pictures
from ip2p_jax.evaluation.examples import Example, ExampleSet, Turn, check, open_examples, picture
from ip2p_jax.evaluation.sets.tables import Spool
from tests.data.released import encode, identify, write_released
from tests.data.released import picture as drawn
from tests.evaluation.layouts import (
    SESSIONS,
    caption,
    emu_rows,
    magicbrush_rows,
    mirror_rows,
    png,
    write_lines,
    write_magicbrush,
    write_table,
)

TURNS = [(i, k) for i, n in enumerate(SESSIONS.values()) for k in range(1, n + 1)]
NAMES = [f"{name}-output{k}" for name, n in SESSIONS.items() for k in range(1, n + 1)]


def shown(data: bytes | None) -> tuple[int, int]:
    """Which picture this is."""
    assert data
    return identify(np.asarray(pictures.decode(data)))


def flags(examples: ExampleSet) -> tuple[bool, bool, bool, int]:
    has = examples.has_input_captions, examples.has_output_captions, examples.has_targets
    return *has, examples.turns


def by_hand(i: int, k: int, described: bool) -> Turn:
    captions = (caption(i, k - 1), caption(i, k)) if described else (None, None)
    return Turn(f"edit {i} turn {k}", *captions, png(i, k), png(60 + i, k))


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("sets") / "released", 40, pairs=3)


def test_released_takes_the_last_twentieth_and_the_first_seed(released):
    examples = open_examples(released)
    assert flags(examples) == (True, True, True, 1)
    assert [x.name for x in examples] == ["0000038/1380", "0000039/1390"]
    folder = released / "0000039"
    turn = Turn("invert 39", "scene 39", "negative 39", (folder / "1390_1.jpg").read_bytes())
    assert examples[1] == Example("0000039/1390", (folder / "1390_0.jpg").read_bytes(), (turn,))
    sizes = [len(open_examples(released, split=x)) for x in ("train", "validation", "test")]
    assert sizes == [36, 2, 2]


def test_packed_pairs_are_the_same_examples(packed, tmp_path):
    """Both layouts agree on splits, order, names and bytes (`packed` has 4 pairs a prompt)."""
    again = open_examples(write_released(tmp_path / "released", 40))
    examples = open_examples(packed)
    assert list(examples) == list(again)
    assert flags(examples) == flags(again)
    check(examples, "crop")


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 2]])
def test_magicbrush_single_turns_start_from_the_truth(tmp_path, table, order):
    """In any order of access; the parquet files have no captions."""
    if table:
        rows = magicbrush_rows()
        write_table(tmp_path / "data/dev-00000-of-00002-0a.parquet", rows[:3])
        write_table(tmp_path / "data/dev-00001-of-00002-0b.parquet", rows[3:])
        write_table(tmp_path / "data/train-00000-of-00001-0c.parquet", rows[:1])
    else:
        write_magicbrush(tmp_path / "dev")
    examples = open_examples(tmp_path, split="dev")
    assert flags(examples) == (not table, not table, True, 1)
    assert len(examples) == 6
    for n in order:
        i, k = TURNS[n]
        assert examples[n] == Example(NAMES[n], png(i, k - 1), (by_hand(i, k, not table),))
    check(examples, "refuse")


@pytest.mark.parametrize("table", [False, True])
def test_magicbrush_sessions_chain(tmp_path, table):
    """Turns of a session may lie in two files, in any order."""
    rows = magicbrush_rows()
    files = rows[:1] + rows[3:4], rows[4:] + rows[1:3]
    if table:
        for n, part in enumerate(files):
            write_table(tmp_path / f"default/test/{n:04d}.parquet", part)
    else:
        write_magicbrush(tmp_path)
    examples = open_examples(tmp_path, turns="multi")
    assert flags(examples) == (not table, not table, True, 3)
    assert {x.name: x for x in examples} == {
        name: Example(name, png(i, 0), tuple(by_hand(i, k + 1, not table) for k in range(n)))
        for i, (name, n) in enumerate(SESSIONS.items())
    }
    if not table:
        assert [x.name for x in examples] == list(SESSIONS)
    check(examples, "refuse")


def test_magicbrush_without_descriptions_has_no_captions(tmp_path):
    assert flags(open_examples(write_magicbrush(tmp_path, described=False)))[:2] == (False, False)


@pytest.mark.parametrize("generations", [False, True])
def test_emu_edit_has_no_targets(tmp_path, generations):
    """What Emu Edit made of the pictures (edited_image, model) is no truth."""
    extra = {"edited_image": {"bytes": png(9, 2), "path": None}, "model": "emu"}
    rows = [row | extra if generations else row for row in emu_rows(5)]
    write_table(tmp_path / "data/test-00000-of-00001-64.parquet", rows)
    write_table(tmp_path / "data/validation-00000-of-00001-65.parquet", rows[:1])
    examples = open_examples(tmp_path)
    assert flags(examples) == (True, True, False, 1)
    assert [x.name for x in examples] == ["local/0", "style/1", "local/2", "style/3", "local/4"]
    assert examples[3] == Example(
        "style/3", png(3, 0), (Turn("edit 3", "scene 3 after 0", "scene 3 after 1"),)
    )
    assert len(open_examples(tmp_path, split="validation")) == 1
    check(examples, "refuse")


def test_mirrors(tmp_path):
    """With and without captions; one file is taken whole; cells may be bytes."""
    rows = mirror_rows(3)
    file = write_table(tmp_path / "train-00000-of-00262-0a.parquet", rows)
    examples = open_examples(file)
    assert flags(examples) == (True, True, True, 1)
    name = "train-00000-of-00262-0a:2"
    turn = Turn("edit 2", caption(2, 0), caption(2, 1), png(2, 1))
    assert examples[2] == Example(name, png(2, 0), (turn,))
    keys = {"input_image": "original_image", "edit_prompt": "edit_prompt"}
    keys["edited_image"] = "edited_image"
    bare = [{new: row[old] for new, old in keys.items()} for row in rows]
    examples = open_examples(write_table(tmp_path / "b.parquet", bare))
    assert flags(examples) == (False, False, True, 1)
    assert examples[1] == Example("b:1", png(1, 0), (Turn("edit 1", None, None, png(1, 1)),))
    rows[1]["edited_prompt"] = " "
    examples = open_examples(write_table(tmp_path / "c.parquet", rows))
    assert flags(examples) == (True, False, True, 1)
    assert flags(examples.take([2, 0])) == (True, True, True, 1)
    assert [x.name for x in examples.take([2, 0])] == ["c:2", "c:0"]


def test_a_row_group_is_read_once_and_only_when_needed(tmp_path, monkeypatch):
    loaded = []
    load = Spool._load

    def spy(self, file, group):
        loaded.append(group)
        load(self, file, group)

    monkeypatch.setattr(Spool, "_load", spy)
    examples = open_examples(write_table(tmp_path / "a.parquet", mirror_rows(6)))
    assert flags(examples) and not loaded
    for i in (5, 0, 4, 1, 5):
        assert shown(examples[i].input) == (i, 0)
    assert loaded == [2, 0]
    with pytest.raises(IndexError):
        examples[6]


SEA = {
    "input": "a.png",
    "name": "sea",
    "turns": [
        {"instruction": "add a boat", "target": "b.png", "output_caption": "a boat at sea"},
        {"instruction": "make it night", "mask": "a.png"},
    ],
}


def test_lines(tmp_path):
    full = {"input": "b.png", "instruction": "x", "target": "c.png", "name": "one"}
    full |= {"input_caption": "b", "output_caption": "c", "mask": "a.png"}
    lines = [full, SEA, {"input": "c.png", "instruction": "y"}]
    file = write_lines(tmp_path / "set.jsonl", lines)
    a, b, c = (png(7, k) for k in range(3))
    boat = Turn("add a boat", None, "a boat at sea", b)
    night = Turn("make it night", None, None, None, a)
    examples = open_examples(file, turns="multi")
    assert flags(examples) == (False, False, False, 2)
    one = Example("one", b, (Turn("x", "b", "c", c, a),))
    last = Example("3", c, (Turn("y"),))
    assert list(examples) == [one, Example("sea", a, (boat, night)), last]
    apart = [Example("sea/1", a, (boat,)), Example("sea/2", b, (night,))]
    assert list(open_examples(file)) == [one, *apart, last]
    assert flags(open_examples(write_lines(tmp_path / "b.jsonl", [full]))) == (True, True, True, 1)


WIDE = drawn(3, 1, (48, 32))


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_pictures_become_squares(fit):
    box = (8, 0, 40, 32) if fit == "crop" else None
    by_pillow = Image.fromarray(WIDE).resize((16, 16), Image.Resampling.LANCZOS, box)
    made = picture(encode(WIDE, "PNG"), 16, fit, "it")
    np.testing.assert_array_equal(made, np.asarray(by_pillow))
    square = picture(png(3, 1), 16, "refuse", "it")
    np.testing.assert_array_equal(square, picture(png(3, 1), 16, fit, "it"))
    assert not np.array_equal(made, square)


def test_a_picture_that_is_no_square_is_refused():
    message = r"^a.png: 48x32 px is not square: give --fit crop or --fit stretch$"
    with pytest.raises(ValueError, match=message):
        picture(encode(WIDE), 16, "refuse", "a.png")
    with pytest.raises(ValueError, match="^a.png: not a picture"):
        picture(b"nothing", 16, "crop", "a.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_headers_tell_the_size_that_decoding_gives(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(WIDE, format, exif=exif.tobytes())
    assert pictures.size(io.BytesIO(data)) == pictures.decode(data).size
    with pytest.raises(ValueError, match="not a picture"):
        pictures.size(io.BytesIO(b"GIF89a"))


def test_check_decodes_nothing(tmp_path, monkeypatch):
    """Files that end after their headers pass, in little time."""
    folder = write_magicbrush(tmp_path)
    for file in folder.glob("images/*/*.png"):
        file.write_bytes(file.read_bytes()[:60])
    check(open_examples(folder, turns="multi"), "refuse")
    with pytest.raises(ValueError, match="139-input.png"):
        examples = open_examples(folder)
        picture(examples[1].input, 16, "refuse", "139-input.png")


def missing(folder: Path) -> str:
    (folder / "images/139/139-output2.png").unlink()
    return "images/139/139-output2.png is not there, expected a picture"


def unreadable(folder: Path) -> str:
    (folder / "images/139/139-mask1.png").write_bytes(b"<html>")
    return "images/139/139-mask1.png: not a picture (JPEG, PNG, WEBP)"


def other_aspect(folder: Path) -> str:
    (folder / "images/2153/2153-output1.png").write_bytes(png(0, 0, (32, 24)))
    return (
        "images/2153/2153-output1.png: 32x24 px, but its input is 32x32: expected the same aspect"
    )


def not_square(folder: Path) -> str:
    for file in (folder / "images/2153").iterdir():
        file.write_bytes(png(0, 0, (32, 24)))
    return "images/2153/2153-input.png: 32x24 px is not square: give --fit crop or --fit stretch"


def no_instruction(folder: Path) -> str:
    sessions = json.loads((folder / "edit_sessions.json").read_text())
    sessions["139"][1]["instruction"] = " "
    (folder / "edit_sessions.json").write_text(json.dumps(sessions))
    return "139-output2 has no instruction"


@pytest.mark.parametrize("turns", ["single", "multi"])
@pytest.mark.parametrize(
    "spoil",
    [missing, unreadable, other_aspect, not_square, no_instruction],
    ids=lambda x: x.__name__,
)
def test_check_names_what_is_wrong(tmp_path, spoil, turns):
    folder = write_magicbrush(tmp_path)
    check(open_examples(folder, turns=turns), "refuse")
    words = spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as caught:
        check(open_examples(folder, turns=turns), "refuse")
    assert "\n" not in str(caught.value)
    if spoil in (other_aspect, not_square):
        check(open_examples(folder, turns=turns), "stretch")


def test_check_finds_doubled_names_and_empty_cells(tmp_path):
    line = {"input": "a.png", "instruction": "x", "name": "twin"}
    examples = open_examples(write_lines(tmp_path / "a.jsonl", [line, line]))
    with pytest.raises(ValueError, match="a.jsonl: two examples are called 'twin'"):
        check(examples, "refuse")
    rows = mirror_rows(3)
    rows[2]["edited_image"] = {"bytes": None, "path": "x.png"}
    examples = open_examples(write_table(tmp_path / "a.parquet", rows))
    with pytest.raises(ValueError, match="a.parquet, row 2, edited_image: holds no encoded pictu"):
        check(examples, "refuse")
    check(examples.take([1, 0]), "refuse")


def lines(path: Path, text: str) -> Path:
    path = path / "set.jsonl"
    path.write_text(text)
    return path


def sessions(path: Path, values: object) -> Path:
    (path / "edit_sessions.json").write_text(json.dumps(values))
    return path


def table(path: Path, rows: list) -> Path:
    write_table(path / "test-00000-of-00001.parquet", rows)
    return path


def text_file(path: Path, name: str) -> Path:
    (path / name).write_text("x")
    return path / name


WRONG = {
    "nowhere": (lambda p: p / "no", "no is not there, expected an evaluation set"),
    "empty": (lambda p: p, "no evaluation set that is known"),
    "unknown": (lambda p: text_file(p, "a.csv"), "no evaluation set that is known"),
    "no table": (lambda p: text_file(p, "a.parquet"), "a.parquet: not a readable parquet file"),
    "columns": (
        lambda p: table(p, [{"image": "x", "text": "y"}]),
        "no column edit_prompt or instruction or edit, found image, text",
    ),
    "split": (
        lambda p: write_table(p / "dev-00000.parquet", mirror_rows(1)).parent,
        "no parquet files of split 'test' (test-*.parquet, or a folder test), found dev",
    ),
    "session split": (
        lambda p: write_magicbrush(p / "dev").parent,
        "test/edit_sessions.json is not there, expected the sessions of MagicBrush",
    ),
    "gap": (
        lambda p: table(p, [magicbrush_rows()[n] for n in (1, 3)]),
        "session 139 has turns 1, 3, expected 1, 2, ...: --turns single can take it",
    ),
    "no sessions": (lambda p: sessions(p, []), "edit_sessions.json: expected a JSON object, found"),
    "none": (lambda p: sessions(p, {}), "edit_sessions.json: holds no session"),
    "no turns": (lambda p: sessions(p, {"1": []}), "session 1 is no list of turns"),
    "outside": (
        lambda p: sessions(p, {"1": [{"input": "../x", "output": "y"}]}),
        "session 1: input is '../x', expected a file name",
    ),
    "few": (lambda p: write_released(p / "x", 3), "none of its 3 prompts belongs to split valida"),
    "blank": (lambda p: lines(p, "\n"), "set.jsonl: holds no example"),
    "no json": (lambda p: lines(p, "\n{"), "set.jsonl, line 2: not JSON"),
    "list": (lambda p: lines(p, "[]"), "line 1: expected a JSON object"),
    "key": (lambda p: lines(p, '{"image": 1}'), "'image' is not known, expected one of input, "),
    "input": (lambda p: lines(p, '{"instruction": "x"}'), "line 1: input is missing"),
    "text": (lambda p: lines(p, '{"input": "a"}'), "line 1: instruction is missing"),
    "number": (lambda p: lines(p, '{"input": 3}'), "line 1: input: 3, expected a text"),
    "turns": (
        lambda p: lines(p, '{"input": "a", "turns": []}'),
        "line 1: turns: expected a list of objects",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_opened_is_one_line(tmp_path, name):
    make, words = WRONG[name]
    split = "validation" if name == "few" else "test"
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as caught:
        open_examples(make(tmp_path), split=split, turns="multi")
    assert str(tmp_path) in str(caught.value)


def test_wrong_options_are_named(tmp_path, released):
    with pytest.raises(ValueError, match="--layout: 'folder', expected one of pairs, released, "):
        open_examples(released, layout="folder")
    with pytest.raises(
        ValueError, match="--turns multi: .* is released, expected one of magicbrush"
    ):
        open_examples(released, turns="multi")
    with pytest.raises(ValueError, match="--turns: 'both', expected one of single, multi"):
        open_examples(released, turns="both")
    with pytest.raises(ValueError, match="--fit: 'pad', expected one of refuse, crop, stretch"):
        check(open_examples(released), "pad")
    with pytest.raises(ValueError, match="no split 'val', only train, validation, test"):
        open_examples(released, split="val")
    with pytest.raises(ValueError, match="sea/2 has no input of its own"):
        turns = [{"instruction": "x"}, {"instruction": "y"}]
        open_examples(write_lines(tmp_path / "a.jsonl", [SEA | {"turns": turns}]))
    with pytest.raises(FileNotFoundError, match="0000038/prompt.json is not there"):
        again = write_released(tmp_path / "again", 40, pairs=1)
        (again / "0000038/prompt.json").unlink()
        check(open_examples(again), "crop")
