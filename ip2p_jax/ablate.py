# SPDX-License-Identifier: Apache-2.0
"""Trains and evaluates a list of runs that differ in a few options, and draws them in one figure.

  python -m ip2p_jax.ablate configs/ablation.json --output ablation

The file lists the options of `ip2p_jax.train` and `ip2p_jax.evaluate` that all runs share, and what
each run has of its own (figure 10 of the paper: less data, no CLIP filter; and other seeds):

  {"train": {"config": "configs/tpu_v4.py", "config.data.path": "shards"},
   "evaluate": {"data": "shards", "samples": 2000, "image-guidance": "1.0,1.4,1.8"},
   "runs": {"all data": {},
            "10 % of the data": {"train": {"config.data.fraction": 0.1}},
            "no CLIP filter": {"train": {"config.data.path": "shards_unfiltered"}},
            "another seed": {"train": {"config.seed": 1}},
            "SDEdit": {"model": "sd", "evaluate": {"method": "sdedit", "image-guidance": null}}}}

A run's own option goes over the shared one; null takes that away. Each run has DIR/NAME/train and
DIR/NAME/evaluation; one that names a model, which is there, is not trained. The same command again
goes on where it was stopped, and again through runs whose options or configuration have changed
since; in the end DIR holds curves.png and table.md of all runs.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from ip2p_jax import config
from ip2p_jax.cli import Parser, atomic_path, one_line_errors
from ip2p_jax.evaluation import options, report
from ip2p_jax.evaluation.examples import open_examples
from ip2p_jax.evaluation.summary import CURVE
from ip2p_jax.training.checkpoint import CONFIG

PARTS = ("train", "evaluate")


class Run(NamedTuple):
    """One run: its name, and the options of both commands that make it."""

    name: str
    train: dict[str, Any]
    evaluate: dict[str, Any]
    model: str = ""
    """That is evaluated in place of what the run trains."""

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name).strip("._")


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = Parser(
        prog="python -m ip2p_jax.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", help="the list of runs, JSON")
    p.add_argument("--output", required=True, metavar="DIR", help="folder of all runs")
    return p


def read_runs(path: Path) -> list[Run]:
    """Reads the list of runs; ValueError or FileNotFoundError in one line that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a list of runs in JSON")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    shared = options_of(tree, ("runs", *PARTS), str(path))
    named = tree.get("runs")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{path}: runs: expected an object, name of a run -> its own options")
    runs = []
    for name, tree in named.items():
        own = options_of(tree, ("model", *PARTS), f"{path}: {name}")
        model = tree.get("model", "")
        if not isinstance(model, str) or (model and own["train"]):
            raise ValueError(f"{path}: {name}: expected the name of a model, or how to train one")
        train, evaluate = (
            merged(shared[part], own[part], f"{path}: {name}: {part}") for part in PARTS
        )
        runs.append(Run(name, train, evaluate, model))
    folders = [run.folder for run in runs]
    for run in runs:
        if not run.folder or folders.count(run.folder) > 1:
            raise ValueError(f"{path}: run {run.name!r}: expected a name that no other run has")
        if not (run.model or "config" in run.train) or "data" not in run.evaluate:
            raise ValueError(f"{path}: {run.name}: expected train.config and evaluate.data")
        try:
            check(run)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {run.name}: {error}") from None
    return runs


def check(run: Run) -> None:
    """Reads the options of both commands before anything runs; ValueError or OSError."""
    *train, evaluation = (command[1:] for command in commands(run, Path("run")))
    for command in train:
        config.parse(command)
    args = options.parser().parse_args(evaluation)
    options.check(args)
    if args.search or args.hosts > 1 or args.distributed or args.clip == "none":
        raise ValueError("evaluate: expected curves of CLIP's scores, on one host")
    open_examples(args.data, split=args.split, layout=args.layout, turns=args.turns)


def options_of(tree: Any, known: Sequence[str], what: str) -> dict[str, dict[str, Any]]:
    """The options of both commands; ValueError for anything else."""
    if not isinstance(tree, dict):
        raise ValueError(f"{what}: expected an object")
    for key in tree:
        if key not in known:
            raise ValueError(f"{what}: {key!r}, expected one of {', '.join(known)}")
    for part in PARTS:
        taken = {"train": "workdir", "evaluate": "output"}[part]
        if not isinstance(tree.get(part, {}), dict) or {taken, "model"} & set(tree.get(part, {})):
            raise ValueError(f"{what}: {part}: expected options but for model and {taken}")
    return {part: tree.get(part, {}) for part in PARTS}


def merged(shared: dict[str, Any], own: dict[str, Any], what: str) -> dict[str, Any]:
    """Shared options under a run's own, of which null takes one away; ValueError if none is there
    to be taken."""
    for key, value in own.items():
        if value is None and key not in shared:
            raise ValueError(f"{what}: {key} is null, expected it among the shared options")
    return {key: value for key, value in (shared | own).items() if value is not None}


def arguments(options: dict[str, Any]) -> list[str]:
    """Options as they are given on a command line; a flag is true, or left out."""
    given = []
    for name, value in options.items():
        if type(value) is not bool or name.startswith("config."):
            given.append(f"--{name}={value}")
        elif value:
            given.append(f"--{name}")
    return given


def commands(run: Run, folder: Path) -> list[list[str]]:
    """What makes a run, in order."""
    workdir, output = folder / "train", folder / "evaluation"
    train = ["ip2p_jax.train", *arguments(run.train), f"--workdir={workdir}"]
    where = [f"--model={run.model or workdir}", f"--output={output}"]
    evaluation = ["ip2p_jax.evaluate", *arguments(run.evaluate), *where]
    return [evaluation] if run.model else [train, evaluation]


def make(run: Run, folder: Path) -> int:
    """Trains and evaluates a run, unless just that is done; returns the exit code."""
    wanted, done = recipe(run, folder), folder / "done.json"
    if done.exists() and json.loads(done.read_text()) == wanted:
        return 0
    for command in wanted["commands"]:
        # in a process of its own, so that each has the devices to itself
        code = subprocess.run([sys.executable, "-m", *command]).returncode
        if code:
            return code
        if not run.model and not is_trained(folder / "train"):  # told to stop, which is no fault
            return 1
    with atomic_path(done) as part:
        part.write_text(json.dumps(wanted))
    return 0


def recipe(run: Run, folder: Path) -> dict[str, Any]:
    """What a run is made by: its commands, and a digest of the configuration that they read."""
    made_by = commands(run, folder)
    parsed = None if run.model else config.parse(made_by[0][1:])
    values = json.dumps(config.flatten(parsed.config) if parsed else {}, sort_keys=True)
    return {"commands": made_by, "config": hashlib.sha256(values.encode()).hexdigest()[:16]}


def is_trained(workdir: Path) -> bool:
    """Whether a run has come to its last step."""
    steps = json.loads((workdir / CONFIG).read_text())["steps"]
    return (workdir / "checkpoints" / str(steps)).is_dir()


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all runs are done, 2 wrong input, else that of the command that failed."""
    args = parser().parse_args(argv)
    runs, output = read_runs(Path(args.file)), Path(args.output)
    console = Console(stderr=True)
    points = {}
    for i, run in enumerate(runs, 1):
        console.print(escape(f"run {i} of {len(runs)}: {run.name}"))
        folder = output / run.folder
        if code := make(run, folder):
            print(
                f"error: {run.name}: its command failed; the same command goes on from there",
                file=sys.stderr,
            )
            return code
        rows = report.read_metrics(folder / "evaluation" / "metrics.jsonl")
        points[run.name] = [row for row in rows if row["kind"] == "point"]
    texts = [f"## {name}\n\n{report.table(rows)}" for name, rows in points.items()]
    with atomic_path(output / "table.md") as part:
        part.write_text("\n".join(texts))
    with atomic_path(output / "curves.png") as part:
        part.write_bytes(report.curve(points, *CURVE))
    print(f"{len(runs)} runs: {output / 'curves.png'}, {output / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
