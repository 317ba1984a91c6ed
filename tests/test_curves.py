# SPDX-License-Identifier: Apache-2.0
"""Claims: `ip2p_jax.curves` draws runs in one figure, whole or not at all, and says what lies
between them; bad input is one line and code 2."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ip2p_jax.curves import main, names_of
from tests.evaluation.rows import example, ours, sdedit


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    mine = write(tmp_path / "mine" / "metrics.jsonl", [example(0, clip_image=0.5), *ours()])
    return mine, write(tmp_path / "theirs" / "metrics.jsonl", sdedit())


def test_draws_and_compares(files, tmp_path, capsys):
    out = tmp_path / "new" / "plot.png"
    assert run(*files, "--output", out) == 0
    with Image.open(out) as picture:
        assert picture.size == (1080, 720)
    assert [path.name for path in out.parent.iterdir()] == ["plot.png"]  # no temporary file
    assert capsys.readouterr().out.splitlines() == [
        "mine - theirs: clip_image +0.2000 in the mean (+0.2000 to +0.2000) at equal "
        "clip_direction from 0.1000 to 0.2500",
        str(out),
    ]
    first = out.read_bytes()
    assert run(*files, "--output", out, "--labels", "A", "B") == 0
    assert capsys.readouterr().out.startswith("A - B: ")
    assert out.read_bytes() != first


@pytest.mark.parametrize(("suffix", "begin"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_other_formats(files, tmp_path, suffix, begin):
    out = tmp_path / f"plot.{suffix}"
    assert run(*files, "--output", out) == 0
    assert out.read_bytes().startswith(begin)


def test_other_scores_and_every_pair(files, tmp_path, capsys):
    """Three runs are three pairs; the axes can be exchanged."""
    third = write(tmp_path / "high" / "metrics.jsonl", ours(0.5))
    out = tmp_path / "plot.png"
    assert run(*files, third, "--output", out, "--x", "clip_image", "--y", "clip_direction") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "mine - theirs",
        "mine - high",
        "theirs - high",
    ]
    assert "clip_direction +0.2000 in the mean" in lines[0]
    assert lines[1] == ("mine - high: no clip_image in common (0.700 to 0.900; 1.200 to 1.400)")


def test_a_file_of_two_methods_and_a_single_line(files, tmp_path, capsys):
    both = write(tmp_path / "both" / "metrics.jsonl", [*ours(), *sdedit()])
    assert run(both, "--output", tmp_path / "plot.png") == 0
    assert capsys.readouterr().out.startswith("InstructPix2Pix - SDEdit: clip_image +0.2000")
    assert run(files[0], "--output", tmp_path / "plot.png") == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "plot.png")]


def test_names():
    """As much of the folders as tells runs apart."""
    a, b, c = (Path(x) / "metrics.jsonl" for x in ("/runs/a/test", "/runs/b/test", "/runs/b/dev"))
    assert names_of([a, c], None) == ["test", "dev"]
    assert names_of([a, b], None) == ["a/test", "b/test"]
    assert names_of([a, b, c], None) == ["a/test", "b/test", "b/dev"]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.count("\n  python -m ip2p_jax.curves ") == 3
    assert "clip_direction" in out and "dino_input" in out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["none.jsonl", "--output", "p.png"], "none.jsonl: no such file"),
        (["a", "--output", "p.png"], "a: a folder, expected the metrics.jsonl of an evaluation"),
        (["a/m", "--output", "p.jpg"], "--output p.jpg: expected a name in .png, .svg or .pdf"),
        (["a/m"], "the following arguments are required: --output"),
        (["a/m", "a/m", "--output", "p.png"], "is given 2 times"),
        (["a/m", "b/m", "--output", "p.png", "--labels", "x", "x"], "--labels: x is given 2 times"),
        (["a/m", "--output", "p.png", "--labels", "x", "y"], "--labels: 2 names for 1 files"),
        (["a/m", "--output", "p.png", "--x", "fid"], "argument --x: invalid choice: 'fid'"),
        (["a/m", "--output", "p.png", "--y", "clip_direction"], "the same as --x"),
        (["a/m", "--output", "p.png", "--y", "l1"], "a: no point has both clip_direction and l1"),
        (["broken", "--output", "p.png"], "broken, line 2: not JSON (Expecting value, column 1)"),
        (["examples", "--output", "p.png"], "examples: holds no point, expected a finished eval"),
        (["a/m", "--output", "a/m/p.png"], "a/m"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, args, line):
    monkeypatch.chdir(tmp_path)
    write(Path("a/m"), ours())
    write(Path("b/m"), sdedit())
    write(Path("examples"), [example(0, clip_image=0.5)])
    Path("broken").write_text(json.dumps(ours()[0]) + "\nnonsense\n")
    before = sorted(tmp_path.rglob("*"))
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
