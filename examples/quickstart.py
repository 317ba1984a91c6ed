# SPDX-License-Identifier: Apache-2.0
"""From nothing to edited pictures, then the whole method once in small, in a drawn world.

  python examples/quickstart.py --output quickstart

Edits three scenes with the embedded model. Then goes the way that such a model comes from: makes
training pairs with Prompt-to-Prompt, filtered by CLIP; trains an editor on them for a moment, which
is stopped and goes on; edits the scenes with it, and measures both. Runs the commands a user would
run, shows each of them, and writes DIR/index.html with the pictures and numbers. Takes a few
minutes on 2 cores; nothing is downloaded. The same command again does what is missing.
"""

import argparse
import html
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.console import Console

from data_gen.shapes.edits import apply, draw_changes, instruct
from data_gen.shapes.render import render
from data_gen.shapes.scene import draw_scene
from data_gen.shapes.words import draw_voice

KINDS = ("recolour", "retexture", "background", "restyle")
COUNTS = (1, 2, 3)  # objects of the three scenes
SEED = 7
SIDE = 128  # of a picture on the sheets, px
SAMPLING = ["--steps", "12", "--sampler", "dpmpp_2m"]
TEXT_GUIDANCE = 4.0
GUIDANCE = {"text_guidance": TEXT_GUIDANCE, "image_guidance": 1.5}
FILTER = ["--clip-threshold", "0.7", "--clip-dir-threshold", "0.4", "--clip-img-threshold", "0.35"]
STEPS, STOP_AFTER = 200, 50

console = Console(stderr=True)


class Row(NamedTuple):
    """A picture, what is asked of it, and the true edits."""

    picture: Image.Image
    instructions: list[str]
    truths: list[Image.Image]


def run(*arguments: str, stop_at: Path | None = None) -> None:
    """Runs `python ARGUMENTS`; sends SIGTERM, as a preemption would, once `stop_at` exists."""
    console.rule(shlex.join(["python", *arguments]), align="left")
    process = subprocess.Popen([sys.executable, *arguments])
    while stop_at is not None and process.poll() is None and not stop_at.exists():
        time.sleep(0.2)
    if stop_at is not None and process.poll() is None:
        process.send_signal(signal.SIGTERM)
    if process.wait():
        sys.exit(f"python {shlex.join(arguments)} failed with exit code {process.returncode}")


def scenes() -> list[Row]:
    """Drawn, in words of training, with an edit of each kind and its true result."""
    rows = []
    for count in COUNTS:
        rng = random.Random(f"quickstart {SEED} {count}")
        scene, voice = draw_scene(rng, count, held_out=False), draw_voice(rng)
        changes = [draw_changes(rng, scene, None, (kind,), held_out=False) for kind in KINDS]
        texts = [instruct(rng, scene, change, voice, held_out=False) for change in changes]
        truths = [Image.fromarray(render(apply(scene, change))) for change in changes]
        rows.append(Row(Image.fromarray(render(scene)), texts, truths))
    return rows


def edit(output: Path, name: str, model: str, rows: Sequence[Row]) -> Path:
    """Edits all pictures; returns a sheet of them and the results, each left of the true edit."""
    requests = []
    for i, row in enumerate(rows):
        source = output / f"{name}_{i}.png"
        row.picture.save(source)
        for j, instruction in enumerate(row.instructions):
            edited = output / name / f"{i}_{j}.png"
            request = {"input": str(source), "instruction": instruction, "output": str(edited)}
            requests.append(request | GUIDANCE)
    listed = output / f"{name}.jsonl"
    listed.write_text("".join(json.dumps(request) + "\n" for request in requests))
    run("-m", "ip2p_jax.edit", "--model", model, "--requests", str(listed), *SAMPLING)
    lines = []
    for i, row in enumerate(rows):
        edited = [Image.open(output / name / f"{i}_{j}.png") for j in range(len(row.instructions))]
        pairs = zip(edited, row.truths, strict=True)
        lines.append([row.picture, *(x for pair in pairs for x in pair)])
    sheet = Image.new("RGB", (len(lines[0]) * SIDE, len(lines) * SIDE))
    for i, line in enumerate(lines):
        for j, picture in enumerate(line):
            sheet.paste(
                picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (j * SIDE, i * SIDE)
            )
    path = output / f"{name}.png"
    sheet.save(path)
    return path


def make_pairs(output: Path) -> None:
    """Texts, pairs of pictures, shards."""
    texts, pairs = output / "triplets.jsonl", output / "pairs"
    if not texts.exists():
        drawn = ["--triplets", "16", "--objects", "1", "--seed", "9"]
        run("-m", "data_gen.shapes", "--output", str(texts), *drawn)
    made = ["-m", "data_gen.pairs", "--triplets", str(texts), "--output", str(pairs), *SAMPLING]
    made += ["--model", "shapes-sd", "--min-cfg", "3", "--max-cfg", "5"]
    run(*made, "--clip", "shapes-clip", *FILTER, "--candidates", "4", "--rows", "4")
    if not (output / "shards").exists():
        run("-m", "data_gen.pack", "--input", str(pairs), "--output", str(output / "shards"))


def train(output: Path) -> Path:
    """An editor from the text-to-image model; stopped, and resumed by the same command."""
    folder = output / "run"
    command = ["-m", "ip2p_jax.train", "--config", "configs/shapes/short.py"]
    command += ["--workdir", str(folder), f"--config.data.path={output / 'shards'}"]
    run(*command, stop_at=folder / "checkpoints" / str(STOP_AFTER))
    run(*command)
    return folder


def evaluate(output: Path, models: dict[str, str]) -> Path:
    """Curves over image guidance on rendered pairs that nothing was trained on."""
    data, curves = output / "validation", output / "curves.png"
    run("-m", "data_gen.shapes", "--output", str(data), "--pairs", "12", "--seed", "1")
    asked = ["--data", str(data), "--split", "train", "--clip", "shapes-clip", *SAMPLING]
    asked += ["--text-guidance", str(TEXT_GUIDANCE), "--image-guidance", "1.0,2.0"]
    for name, model in models.items():
        run("-m", "ip2p_jax.evaluate", "--model", model, "--output", str(output / name), *asked)
    files = [str(output / name / "metrics.jsonl") for name in models]
    run("-m", "ip2p_jax.curves", *files, "--output", str(curves))
    return curves


class Shown(NamedTuple):
    """A figure of the page, and the rows of texts that belong to it."""

    title: str
    file: Path
    texts: list[list[str]] = []


def page(output: Path, figures: Sequence[Shown], seconds: float) -> None:
    """Writes index.html."""
    parts = []
    for title, file, texts in figures:
        asked = "".join(f"<li>{' | '.join(map(html.escape, line))}</li>" for line in texts)
        parts.append(f"<h2>{html.escape(title)}</h2>{asked and f'<ol>{asked}</ol>'}")
        parts.append(f"<img src='{file.relative_to(output)}'>")
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    losses = "".join(
        f"<tr><td>{x['step']}</td><td>{x['loss']:.4f}</td>"
        f"<td>{x.get('examples_per_second', 0):.1f}</td></tr>"
        for x in map(json.loads, lines)
        if "loss" in x
    )
    (output / "index.html").write_text(
        "<!doctype html><meta charset='utf-8'><title>ip2p_jax</title>"
        "<style>body{font:16px sans-serif;max-width:75em;margin:2em auto}img{max-width:100%}"
        f"td,th{{padding:.1em 1em;text-align:right}}</style><h1>ip2p_jax</h1>{''.join(parts)}"
        f"<h2>Training</h2><p>{STEPS} steps on the pairs above; stopped by SIGTERM, then resumed by"
        f" the same command. All of this took {seconds:.0f} s.</p>"
        f"<table><tr><th>step</th><th>loss</th><th>examples a second</th></tr>{losses}</table>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="quickstart", type=Path)
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    start, drawn = time.monotonic(), scenes()
    texts = [row.instructions for row in drawn]
    edited = edit(output, "edits", "shapes", drawn)
    make_pairs(output)
    trained = str(train(output))
    tried = edit(output, "after", trained, drawn)
    measured = evaluate(output, {"embedded": "shapes", "short": trained})
    figures = [
        Shown("Edits of the embedded model; each left of the true edit", edited, texts),
        Shown("Training pairs, made with Prompt-to-Prompt", output / "pairs/contact_sheet.png"),
        Shown(f"The same edits after {STEPS} steps of training on these pairs", tried, texts),
        Shown("How much is changed, how much is kept: both models", measured),
    ]
    page(output, figures, time.monotonic() - start)
    console.print(f"[bold]Open {output / 'index.html'}")


if __name__ == "__main__":
    main()
