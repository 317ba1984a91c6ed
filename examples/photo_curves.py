# SPDX-License-Identifier: Apache-2.0
"""Evaluates an editor of photographs over both guidance scales, against true edits.

  python examples/photo_curves.py --model photos --output docs/curves

Crops of scikit-image's chelsea, which no training has seen, are edited by seven instructions in
wordings that training never saw. Writes a set in `ip2p_jax.evaluate`'s JSONL, evaluates the model
on it, and draws nearness to the true edit over nearness to the input: the trade-off of the paper's
figure 8, where the right edit is known. Beside it one example under both scales.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from photo_edits import MEASURED
from PIL import Image

from data_gen.edits import EDITS
from data_gen.photos import held_out_crops
from ip2p_jax import curves, evaluate
from ip2p_jax.cli import Parser, atomic_path, one_line_errors

KEPT = ("table.md", "guidance.png")
STEPS = ("--steps", "15", "--sampler", "dpmpp_2m")


def write_set(folder: Path, count: int) -> Path:
    """Writes crops, their true edits and the list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, crop in enumerate(held_out_crops(count)):
        Image.fromarray(crop).save(folder / f"{i}.png")
        for name in MEASURED:
            edit, target = EDITS[name], f"{i}_{name}.png"
            Image.fromarray(edit.function(crop)).save(folder / target)
            instruction = edit.held_out[i % len(edit.held_out)]
            lines.append({"input": f"{i}.png", "instruction": instruction, "target": target})
    path = folder / "set.jsonl"
    with atomic_path(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="photos", help="as in ip2p_jax.edit (photos)")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--work", default="runs/photo_curves", help="where it is computed")
    parser.add_argument("--count", type=int, default=8, help="crops (8)")
    parser.add_argument("--text-guidance", default="1,2,4")
    parser.add_argument("--image-guidance", default="1.0,1.2,1.5,2.0")
    args = parser.parse_args(argv)
    work = Path(args.work) / f"{Path(args.model).name}_{args.count}"
    output = Path(args.output)
    scales = ["--text-guidance", args.text_guidance, "--image-guidance", args.image_guidance]
    listed, results = write_set(work / "set", args.count), work / "evaluation"
    options = ["--clip", "none", "--rows", "8", "--pictures", "7", "--output", str(results)]
    code = evaluate.main(["--model", args.model, "--data", str(listed), *scales, *STEPS, *options])
    if code:
        return code
    output.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (results / name).exists():
            shutil.copyfile(results / name, output / name)
    axes = ["--x", "psnr_input", "--y", "psnr", "--labels", args.model]
    figure = str(output / "curve.png")
    return curves.main([str(results / "metrics.jsonl"), *axes, "--output", figure])


if __name__ == "__main__":
    sys.exit(main())
