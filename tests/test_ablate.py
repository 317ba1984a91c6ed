# SPDX-License-Identifier: Apache-2.0
"""Claims: a list of runs is trained, evaluated and drawn by one command, which goes on where it was
stopped; wrong lists are refused in one line before anything runs."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ip2p_jax import ablate
from ip2p_jax.evaluation.report import read_metrics
from tests import oracles
from tests.toy_runs import CONFIG, toy_options

DATA = "set.jsonl"
GOOD = {
    "train": {"config": CONFIG, "config.steps": 4},
    "evaluate": {"data": DATA, "legacy": True, "samples": 3},
    "runs": {"all": {}, "10 % of it": {"train": {"config.data.fraction": 0.1}}},
}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A set, as it is named in the lists."""
    monkeypatch.chdir(tmp_path)
    Path(DATA).write_text('{"input": "cat.png", "instruction": "make it a dog"}\n')


def write(folder: Path, tree: object) -> Path:
    path = folder / "runs.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_options_of_a_run_go_over_the_shared_ones(tmp_path):
    first, second = ablate.read_runs(write(tmp_path, GOOD))
    assert (first.name, first.folder, second.folder) == ("all", "all", "10_of_it")
    assert "config.data.fraction" not in first.train
    train, evaluate = ablate.commands(second, Path("out"))
    assert train == [
        "ip2p_jax.train",
        *(f"--config={CONFIG}", "--config.steps=4", "--config.data.fraction=0.1"),
        "--workdir=out/train",
    ]
    assert evaluate == [
        *("ip2p_jax.evaluate", f"--data={DATA}", "--legacy", "--samples=3"),
        *("--model=out/train", "--output=out/evaluation"),
    ]
    there = {"model": "sd/", "evaluate": {"method": "sdedit"}}
    tree = {**GOOD, "runs": {"SDEdit": there}}
    [run] = ablate.read_runs(write(tmp_path, tree))
    shared = (f"--data={DATA}", "--legacy", "--samples=3")
    mine = ("--method=sdedit", "--model=sd/", "--output=out/evaluation")
    assert ablate.commands(run, Path("out")) == [["ip2p_jax.evaluate", *shared, *mine]]
    assert ablate.arguments({"legacy": False, "config.a": False}) == ["--config.a=False"]


def test_null_takes_a_shared_option_away(tmp_path):
    sdedit = {"model": "sd", "evaluate": {"method": "sdedit", "image-guidance": None}}
    shared = {**GOOD["evaluate"], "image-guidance": "1,2"}
    tree = {**GOOD, "evaluate": shared, "runs": {"all": {}, "SDEdit": sdedit}}
    first, second = ablate.read_runs(write(tmp_path, tree))
    assert first.evaluate == shared
    assert second.evaluate == {**GOOD["evaluate"], "method": "sdedit"}


def test_an_edited_configuration_is_another_run(tmp_path, monkeypatch):
    """Its file has the same name; what says the same in other words is done."""
    calls = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(ablate.subprocess, "run", lambda line: calls.append(line) or done)
    monkeypatch.setattr(ablate, "is_trained", lambda _: True)
    file, out = tmp_path / "recipe.py", tmp_path / "out"
    out.mkdir()
    tree = {**GOOD, "train": {"config": str(file)}, "runs": {"all": {}}}
    text = "from ip2p_jax.config import Config, Data\n\n\ndef get_config():\n"
    for seed, started in (("1", 2), ("1", 2), ("2 - 1", 2), ("2", 4)):
        file.write_text(f"{text}    return Config(data=Data(path='x'), seed={seed})\n")
        [run] = ablate.read_runs(write(tmp_path, tree))
        assert ablate.make(run, out) == 0 and len(calls) == started


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("{", "not JSON"),
        ([], "expected an object"),
        ({**GOOD, "run": {}}, "'run', expected one of runs, train, evaluate"),
        ({**GOOD, "runs": {}}, "runs: expected an object, name of a run"),
        ({**GOOD, "runs": {"a": {"trian": {}}}}, "a: 'trian', expected one of model, train"),
        (
            {**GOOD, "runs": {"a": {"model": "x", "train": {"a": 1}}}},
            "a: expected the name of a model",
        ),
        ({**GOOD, "runs": {"a b": {}, "a_b": {}}}, "expected a name that no other run has"),
        ({**GOOD, "runs": {"%": {}}}, "expected a name that no other run has"),
        (
            {**GOOD, "runs": {"a": {"evaluate": {"seed": None}}}},
            "a: evaluate: seed is null, expected it among the shared options",
        ),
        ({**GOOD, "train": {}}, "all: expected train.config and evaluate.data"),
        ({**GOOD, "evaluate": {"data": DATA, "output": "x"}}, "evaluate: expected options but"),
        ({**GOOD, "evaluate": {"data": "none"}}, "all: none is not there"),
        ({**GOOD, "evaluate": {"data": DATA, "sample_s": 3}}, "all: unrecognized arguments"),
        ({**GOOD, "evaluate": {"data": DATA, "image-guidance": [1, 2]}}, "expected numbers like"),
        ({**GOOD, "evaluate": {"data": DATA, "clip": "none"}}, "all: evaluate: expected curves"),
        (
            {**GOOD, "train": {"config": CONFIG, "config.stepps": 1}},
            "all: --config: Field stepps not found",
        ),
        ({**GOOD, "train": {"config": "none.py"}}, "all: "),
    ],
)
def test_wrong_lists(tmp_path, capsys, tree, words):
    path = write(tmp_path, tree)
    assert ablate.main([str(path), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_no_list(tmp_path, capsys):
    assert ablate.main([str(tmp_path / "none.json"), "--output", str(tmp_path)]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_two_runs(packed, tmp_path, monkeypatch, capsys):
    """All of it: two small runs, one on part of the data, from training to the figure."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    options = (x.removeprefix("--").split("=", 1) for x in toy_options(packed, tmp_path))
    tree = {
        "train": {
            **dict(options),
            "config.steps": 4,
        },
        "evaluate": {
            "data": str(packed),
            "clip": str(oracles.tiny_clip(tmp_path / "clip")),
            "steps": 2,
            "samples": 2,
            "fit": "crop",
            "image-guidance": "1,2",
        },
        "runs": {"all": {}, "a quarter": {"train": {"config.data.fraction": 0.25}}},
    }
    path, out = write(tmp_path, tree), tmp_path / "out"
    command = [str(path), "--output", str(out)]
    tree["runs"]["a quarter"]["train"]["config.data.resolution"] = 17  # not what networks take
    path = write(tmp_path, tree)
    assert ablate.main(command) == 2  # the second run cannot begin
    assert "a quarter: its command failed" in capsys.readouterr().err
    assert (out / "all" / "done.json").exists() and not (out / "curves.png").exists()
    before = (out / "all" / "evaluation" / "metrics.jsonl").stat().st_mtime_ns

    del tree["runs"]["a quarter"]["train"]["config.data.resolution"]
    write(tmp_path, tree)
    assert ablate.main(command) == 0
    assert (out / "all" / "evaluation" / "metrics.jsonl").stat().st_mtime_ns == before
    metrics = [read_metrics(out / x / "evaluation" / "metrics.jsonl") for x in ("all", "a_quarter")]
    points = [[row for row in rows if row["kind"] == "point"] for rows in metrics]
    assert [len(rows) for rows in points] == [2, 2] and points[0] != points[1]
    with Image.open(out / "curves.png") as figure:
        assert figure.width > 500
    table = (out / "table.md").read_text()
    assert "## all" in table and "## a quarter" in table
