# SPDX-License-Identifier: Apache-2.0
"""From nothing to edited pictures and a short training run that is stopped and resumes.

  python examples/quickstart.py --output quickstart

Runs the commands a user would run, shows each of them, and writes DIR/index.html with the pictures
and numbers. Takes a few minutes on 2 cores; nothing is downloaded.
"""

import argparse
import html
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import skimage.data
from PIL import Image
from rich.console import Console

INSTRUCTIONS = (
    "make it black and white",
    "turn it sepia",
    "invert the colours",
    "give it a red tint",
)
PHOTOS = {
    "chelsea": (110, 20, 400, 290),
    "coffee": (100, 0, 500, 400),
    "astronaut": (60, 0, 410, 350),
}
PAIRS, STOP_AFTER = 400, 20

console = Console(stderr=True)


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


def edit_photos(output: Path, model: str, name: str, steps: int) -> Path:
    """Edits each photograph by each instruction in one batch; returns the contact sheet."""
    requests = []
    for photo, box in PHOTOS.items():
        source = output / f"{photo}.png"
        Image.fromarray(getattr(skimage.data, photo)()).crop(box).save(source)
        for i, instruction in enumerate(INSTRUCTIONS):
            requests.append(
                {
                    "input": str(source),
                    "instruction": instruction,
                    "output": str(output / name / f"{photo}_{i}.png"),
                    "steps": steps,
                    "sampler": "dpmpp_2m",
                    "text_guidance": 2.0,
                    "image_guidance": 1.2,
                }
            )
    listed = output / f"{name}.jsonl"
    listed.write_text("".join(json.dumps(r) + "\n" for r in requests))
    run("-m", "ip2p_jax.edit", "--model", model, "--requests", str(listed))
    size = 128
    sheet = Image.new("RGB", ((1 + len(INSTRUCTIONS)) * size, len(PHOTOS) * size))
    for row, photo in enumerate(PHOTOS):
        files = [output / f"{photo}.png"]
        files += [output / name / f"{photo}_{i}.png" for i in range(len(INSTRUCTIONS))]
        for column, file in enumerate(files):
            picture = Image.open(file).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * size, row * size))
    path = output / f"{name}.png"
    sheet.save(path)
    return path


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def page(output: Path, sheets: dict[str, Path], lines: list[dict], seconds: float) -> None:
    """Writes index.html."""
    rows = "".join(
        f"<tr><td>{x['step']}</td><td>{x['loss']:.4f}</td>"
        f"<td>{x['examples_per_second']:.1f}</td></tr>"
        for x in lines
    )
    heads = " | ".join(["input", *map(html.escape, INSTRUCTIONS)])
    pictures = "".join(
        f"<h2>{html.escape(title)}</h2><p>{heads}</p><img src='{path.name}'>"
        for title, path in sheets.items()
    )
    (output / "index.html").write_text(
        "<!doctype html><meta charset='utf-8'><title>ip2p_jax</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:.1em 1em;text-align:right}</style>"
        f"<h1>ip2p_jax</h1>{pictures}<h2>Training</h2>"
        f"<p>{PAIRS} pairs of photographs; stopped by SIGTERM, then resumed by the same command."
        f" All of this took {seconds:.0f} s.</p>"
        f"<table><tr><th>step</th><th>loss</th><th>examples a second</th></tr>{rows}</table>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="quickstart", type=Path)
    parser.add_argument("--steps", default=20, type=int, help="sampling steps of the edits (20)")
    args = parser.parse_args()
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    sheets = {"Edits": edit_photos(output, "photos", "edits", args.steps)}
    if not (output / "photos").exists():
        pairs = ["--output", str(output / "pairs"), "--count", str(PAIRS)]
        if not (output / "pairs").exists():
            run("examples/photo_pairs.py", *pairs)
        run(
            "-m",
            "data_gen.pack",
            "--input",
            str(output / "pairs"),
            "--output",
            str(output / "photos"),
        )
    folder = output / "run"
    train = ["-m", "ip2p_jax.train", "--config", "configs/quickstart_cpu.py"]
    train += ["--workdir", str(folder), f"--config.data.path={output / 'photos'}"]
    run(*train, stop_at=folder / "checkpoints" / str(STOP_AFTER))
    run(*train)
    sheets["After the short training run"] = edit_photos(output, str(folder), "after", args.steps)
    page(output, sheets, metrics(folder), time.monotonic() - start)
    console.print(f"[bold]Open {output / 'index.html'}")


if __name__ == "__main__":
    main()
