# SPDX-License-Identifier: Apache-2.0
"""Measures an editor of photographs against true edits, on a photograph no training has seen.

  python examples/photo_edits.py --model photos --output docs/photos

Crops of scikit-image's chelsea are edited by instructions in wordings that training never saw. An
edit passes if the result is nearer (mean squared error) to that instruction's true edit than to
every other instruction's and than to the input. Controls: the same measure for the result of a
wrong instruction, which must rarely pass, and the autoencoder's own error. Writes table.md,
results.json and grid.png.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw
from rich.progress import track

from data_gen.edits import EDITS
from data_gen.photos import held_out_crops
from ip2p_jax.cli import Parser, atomic_path, one_line_errors, set_up_jax
from ip2p_jax.editor import Editor
from ip2p_jax.networks import to_pixels, to_uint8
from ip2p_jax.weights.load import load

SIX = ("black_and_white", "sepia", "invert", "red_tint", "brighter", "mirror")
MEASURED = (*SIX, "blur")  # blur stands beside: it is close to the input
ROWS_SHOWN = 5


class Score(NamedTuple):
    """Of one instruction: shares of crops that pass, and mean squared errors in [0, 1]."""

    passed: float
    wrong_passed: float
    error: float
    untouched_error: float


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error of each picture, of uint8 as [0, 1]."""
    difference = (a.astype(np.float32) - b.astype(np.float32)) / 255
    return np.mean(difference**2, axis=(1, 2, 3))


def passes(results: np.ndarray, crops: np.ndarray, truths: dict, name: str) -> np.ndarray:
    """Whether each result is nearest to the true edit `name` among all edits and the input."""
    own = mse(results, truths[name])
    others = [mse(results, truth) for other, truth in truths.items() if other != name]
    return own < np.min([*others, mse(results, crops)], axis=0)


def measure(editor: Editor, count: int, **options) -> tuple[dict[str, Score], dict]:
    """Scores of the instructions, and the pictures behind them."""
    crops = np.stack(held_out_crops(count))
    truths = {n: np.stack([e.function(x) for x in crops]) for n, e in EDITS.items()}
    results = {}
    for name in track(MEASURED, description="editing"):
        wordings = EDITS[name].held_out
        edited = editor(
            [Image.fromarray(x) for x in crops],
            [wordings[i % len(wordings)] for i in range(count)],
            seed=list(range(count)),
            **options,
        )
        results[name] = np.stack([np.asarray(x) for x in edited])
    scores = {}
    for i, name in enumerate(MEASURED):
        wrong = results[MEASURED[(i + 1) % len(MEASURED)]]
        scores[name] = Score(
            float(passes(results[name], crops, truths, name).mean()),
            float(passes(wrong, crops, truths, name).mean()),
            float(mse(results[name], truths[name]).mean()),
            float(mse(crops, truths[name]).mean()),
        )
    return scores, {"crops": crops, "truths": truths, "results": results}


def reconstruction_error(editor: Editor, pictures: np.ndarray) -> float:
    """Mean squared error in [0, 1] of encoding and decoding, the least an edit can have."""

    @jax.jit
    def there_and_back(params, x):
        vae = nnx.merge(editor.model.networks.vae, params)
        return to_uint8(vae.decode(vae.encode(to_pixels(x)).mean))

    back = [there_and_back(editor.model.params["vae"], x[None])[0] for x in pictures]
    return float(mse(np.stack(back), pictures).mean())


def table(scores: dict[str, Score], vae: dict[str, float], count: int) -> str:
    """The scores in Markdown."""
    lines = [
        f"{count} crops of a photograph that no training has seen, in wordings no training has "
        "seen. Errors are mean squared, pixels in [0, 1].",
        "",
        "| instruction | passes | a wrong instruction passes | error | of doing nothing | of the "
        "autoencoder alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in scores.items():
        lines.append(
            f"| {name.replace('_', ' ')} | {s.passed:.0%} | {s.wrong_passed:.0%} | {s.error:.4f} "
            f"| {s.untouched_error:.4f} | {vae[name]:.4f} |"
        )
    return "\n".join(lines) + "\n"


def grid(pictures: dict) -> Image.Image:
    """A sheet: for some crops the input, then result and truth of each instruction."""
    size, header = 96, 16
    sheet = Image.new("RGB", ((1 + 2 * len(MEASURED)) * size, header + ROWS_SHOWN * size), "white")
    draw = ImageDraw.Draw(sheet)
    columns = [("input", pictures["crops"])]
    for name in MEASURED:
        columns.append((name.replace("_", " "), pictures["results"][name]))
        columns.append(("truth", pictures["truths"][name]))
    for i, (title, column) in enumerate(columns):
        draw.text((i * size + 2, 2), title, fill="black")
        for j in range(ROWS_SHOWN):
            picture = Image.fromarray(column[j]).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(picture, (i * size, header + j * size))
    return sheet


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="photos", help="as in ip2p_jax.edit (photos)")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=50, help="crops (50)")
    parser.add_argument("--steps", type=int, default=15, help="sampling steps (15)")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--text-guidance", type=float, default=2.0)
    parser.add_argument("--image-guidance", type=float, default=1.2)
    args = parser.parse_args(argv)
    set_up_jax()
    editor = Editor(load(args.model), rows=64)
    scores, pictures = measure(
        editor,
        args.count,
        steps=args.steps,
        sampler=args.sampler,
        text_guidance=args.text_guidance,
        image_guidance=args.image_guidance,
    )
    vae = {n: reconstruction_error(editor, pictures["truths"][n]) for n in MEASURED}
    text = table(scores, vae, args.count)
    output = Path(args.output)
    results = {n: {**s._asdict(), "autoencoder": vae[n]} for n, s in scores.items()}
    with atomic_path(output / "table.md") as part:
        part.write_text(text)
    with atomic_path(output / "results.json") as part:
        part.write_text(json.dumps({"settings": vars(args), "scores": results}, indent=1) + "\n")
    with atomic_path(output / "grid.png") as part:
        grid(pictures).save(part, "PNG")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
