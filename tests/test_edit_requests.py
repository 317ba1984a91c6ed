# SPDX-License-Identifier: Apache-2.0
"""Claims: what cannot be done is refused in one line, with code 2, before a model is opened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ip2p_jax import edit, jobs
from tests.edits import ONE, PICTURE, huge, tree, write_requests


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory with one picture, in.png."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    return tmp_path


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Runs the command on what it has to refuse without opening a model; returns the line."""

    def run(*args: object, model: str = "some/model") -> str:
        monkeypatch.setattr(jobs, "load", None)  # calling it would be a traceback
        before = tree(folder)
        assert edit.main(["--model", model, *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert tree(folder) == before
        return err

    return run


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--steps", "-5"), "steps: -5, expected 1 to 1000"),
        (("--steps", "0"), "steps: 0, expected 1 to 1000"),
        (("--steps", "1001"), "steps: 1001, expected 1 to 1000"),
        (("--steps", "ten"), "argument --steps: invalid int value: 'ten'"),
        (("--sampler", "plms"), "sampler: 'plms', expected one of euler_ancestral, euler, heun"),
        (("--guidance-rescale", "1.5"), "guidance_rescale: 1.5, expected 0 to 1"),
        (("--guidance-interval", "5", "1"), "guidance_interval: [5.0, 1.0], expected two noise"),
        (("--guidance-interval", "-1", "nan"), "nan], expected two noise levels, 0 or more"),
        (("--text-guidance", "nan"), "text_guidance: nan, expected a finite number"),
        (("--image-guidance", "inf"), "image_guidance: inf, expected a finite number"),
        (("--seed", "-1"), "seed: -1, expected an integer from 0 to 2^32 - 1"),
        (("--resolution", "big"), "argument --resolution: 'big', expected pixels or 'own'"),
        (("--resolution", "-64"), "argument --resolution: '-64', expected pixels or 'own'"),
        (("--resolution", "0"), "resolution: 0, expected pixels (1 to 8192) or 'own'"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
        (("--output", "out.jpg"), "output: 'out.jpg', expected a .png file"),
        (("--output", "in.png"), "output in.png: is an input too"),
        (("--output", "text/out.png"), "text: no file can be made in"),
        (("--output", "text/deeper/out.png"), "text (Not a directory)"),
        (("--output", "/proc/out.png"), "output folder /proc: no file can be made in /proc"),
        (("--output", "folder.png/x.png/"), "x.png/in.png: is a folder"),
        (("--input", "missing.png"), "missing.png is not there"),
        (("--input", "text"), "text: not a picture (JPEG, PNG, WEBP)"),
        (("--input", "huge.png"), "huge.png: more than 67108864 px"),
        (("--input", "folder.png"), "folder.png: a folder, expected a picture"),
        (("--input", "in.png", "text"), "--output: out.png, expected a folder for several"),
        (("--input", "in.png", "a/in.png", "--output", "out"), "out/in.png: is named twice"),
        (("--requests", "r.jsonl"), "--requests: leave out --input, --instruction and --output"),
    ],
)
def test_bad_arguments(refused, folder, args, line):
    (folder / "text").write_text("hello")
    (folder / "huge.png").write_bytes(huge())
    (folder / "folder.png" / "x.png" / "in.png").mkdir(parents=True)
    assert line in refused(*ONE, *args)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "--input is required (or --requests)"),
        (ONE[:2] + ONE[4:], "--instruction is required"),
        (ONE[:4], "--output is required"),
        (("--requests", "missing.jsonl"), "--requests: missing.jsonl: no such file"),
        (("--requests", "empty.jsonl"), "--requests: empty.jsonl: holds no request"),
        (("--requests", "in.png"), "--requests: in.png: not a text in UTF-8"),
        (("--requests", "empty.jsonl", "--instruction", ""), "leave out --input, --instruction"),
    ],
)
def test_incomplete_arguments(refused, folder, args, line):
    (folder / "empty.jsonl").write_text("\n \n")
    assert line in refused(*args)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ('{"input": "a"', "not JSON (Expecting ',' delimiter, column 14)"),
        ("[1, 2]", "expected a JSON object"),
        ('{"instruction": "x", "output": "a.png"}', "input is missing"),
        ({"size": 512}, "'size' is not known, expected one of input, instruction, output, steps"),
        ({"input": 3}, "input: 3, expected a text"),
        ({"negative": None}, "negative: None, expected a text"),
        ({"output": "a.jpg"}, "output: 'a.jpg', expected a .png file"),
        ({"steps": 2.5}, "steps: 2.5, expected 1 to 1000"),
        ({"steps": True}, "steps: True, expected 1 to 1000"),
        ({"sampler": ["ddim"]}, "sampler: ['ddim'], expected one of"),
        ({"seed": 2**32}, "seed: 4294967296, expected"),
        ({"text_guidance": "7"}, "text_guidance: '7', expected a finite number"),
        ({"text_guidance": 10**400}, "too large"),
        ({"text_guidance": 1e39}, "text_guidance: 1e+39, expected a finite number"),
        ({"image_guidance": float("nan")}, "image_guidance: nan, expected a finite number"),
        ({"resolution": "512"}, "resolution: '512', expected pixels (1 to 8192) or 'own'"),
    ],
)
def test_bad_lines(refused, folder, entry, line):
    """The number of the line is named; lines may be empty, and separators inside of texts stay."""
    good = {"input": "in.png", "instruction": "a\u2028b", "output": "a.png"}
    if isinstance(entry, dict):
        entry = json.dumps(good | entry)
    text = f"\ufeff{json.dumps(good, ensure_ascii=False)}\r\n\r\n{entry}\n"
    (folder / "r.jsonl").write_text(text, "utf-8", newline="")
    err = refused("--requests", "r.jsonl")
    assert err.startswith("error: r.jsonl, line 3: ") and line in err


def test_outputs_of_requests_are_checked(refused, folder):
    """Before anything is opened: twice the same, chains of edits, a folder that cannot be."""
    line = {"input": "in.png", "instruction": "x", "output": "a.png"}
    for other, words in (
        ({"output": "./a.png"}, "is named twice"),
        ({"input": "a.png", "output": "b.png"}, "output a.png: is an input too"),
        ({"output": "in.png/b.png"}, "in.png: no file can be made in"),
    ):
        write_requests(folder / "r.jsonl", line, line | other)
        assert words in refused("--requests", "r.jsonl")


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        edit.main(["--help"])
    out = capsys.readouterr().out
    assert out.count("python -m ip2p_jax.edit --model") == 3
    for option in ("--requests", "--resolution", "--negative", "--safety", "dpmpp_2m", "(100)"):
        assert option in out


def test_as_a_process(folder):
    """One line on stderr and nothing else, from the real command."""
    args = ["--model", "no/model", *ONE, "--sampler", "plms"]
    command = [sys.executable, "-m", "ip2p_jax.edit", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: sampler: 'plms', ") and done.stderr.count("\n") == 1
