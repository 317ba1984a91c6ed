# SPDX-License-Identifier: Apache-2.0
"""Times an evaluation curve against a loop over diffusers' pipeline with transformers' CLIP.

  python benchmarks/evaluate.py [--runs 5] [--output benchmarks/evaluate.md]

A curve of 7 image guidance scales over 16 pictures of 64 px: ddim, 20 steps, CLIP's directional and
image similarity of each result. Both: float32, the same small random weights, the same pictures and
scales, each measurement a process of its own, in turn. Theirs edits and scores one picture at a
time, as the authors' evaluation does. What is counted is edits a second once everything is loaded
and compiled. The last line compares ours with itself: 7 evaluations of one point each, which encode
every example 7 times, to one of 7 points.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from processes import measure, median, setting

ROOT = Path(__file__).parent.parent
POINTS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
TEXT_GUIDANCE, STEPS, SIDE, EXAMPLES, ROWS = 7.5, 20, 64, 16, 8
INSTRUCTION, BEFORE, AFTER = "make it winter", "a street", "a street in winter"


def pictures(folder: str) -> list[Path]:
    """The pictures that both edit: crops of a real photograph."""
    import skimage.data
    from PIL import Image

    files = [Path(folder) / f"{i}.png" for i in range(EXAMPLES)]
    photo = Image.fromarray(skimage.data.astronaut())
    for i, file in enumerate(files):
        if not file.exists():
            photo.crop((16 * i, 8 * i, 16 * i + SIDE, 8 * i + SIDE)).save(file)
    return files


def ours(folder: str, clip_folder: str) -> dict:
    import jax

    from ip2p_jax.cli import set_up_jax
    from ip2p_jax.evaluation.examples import open_examples
    from ip2p_jax.evaluation.methods import InstructPix2Pix, Recipe
    from ip2p_jax.evaluation.scorer import open_scorer
    from ip2p_jax.evaluation.sweep import Point, Shown, Sweep, cut
    from ip2p_jax.placed import place
    from ip2p_jax.weights.load import load

    set_up_jax()
    lines = [
        {
            "input": str(file),
            "instruction": INSTRUCTION,
            "input_caption": BEFORE,
            "output_caption": AFTER,
        }
        for file in pictures(folder)
    ]
    listed = Path(folder) / "set.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    method = InstructPix2Pix(place(load(folder)), Recipe(STEPS, "ddim"))
    examples = open_examples(listed)
    sweep = Sweep(method, open_scorer(clip_folder), examples, Shown(SIDE, "refuse"), ROWS)

    def curve(points: tuple[float, ...]) -> None:
        scales = [sweep.everywhere(Point(TEXT_GUIDANCE, s)) for s in points]
        for n, unit in enumerate(cut(range(EXAMPLES), ROWS)):
            for result in sweep.results(sweep.load([n], [unit]), scales):
                jax.block_until_ready(result.turns)

    curve(POINTS[:1])
    whole = timed(lambda: curve(POINTS))
    apart = timed(lambda: [curve((s,)) for s in POINTS])
    return {"edits/s": EXAMPLES * len(POINTS) / whole, "7 runs of 1 point / 1 of 7": apart / whole}


def timed(work) -> float:
    """Seconds: the median of three goes."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def theirs(folder: str, clip_folder: str) -> dict:
    import numpy as np
    import torch
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
    from PIL import Image
    from torch.nn.functional import cosine_similarity, interpolate
    from transformers import CLIPModel, CLIPTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    side = clip.config.vision_config.image_size
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    images = [Image.open(file) for file in pictures(folder)]

    def embed(image):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        x = interpolate(x, size=(side, side), mode="bicubic")
        return clip.visual_projection(clip.vision_model((x - mean) / std).pooler_output)

    def edit(image, scale: float) -> None:
        [result] = pipe(
            INSTRUCTION,
            image,
            num_inference_steps=STEPS,
            guidance_scale=TEXT_GUIDANCE,
            image_guidance_scale=scale,
        ).images
        tokens = tokenizer([BEFORE, AFTER], padding=True, return_tensors="pt")
        text = clip.text_projection(clip.text_model(**tokens).pooler_output)
        before, after = embed(image), embed(result)
        cosine_similarity(before, after)
        cosine_similarity(after - before, text[1:] - text[:1])

    with torch.no_grad():
        edit(images[0], POINTS[0])
        some = images[:4]  # it does one at a time, so a part says as much
        seconds = timed(lambda: [edit(image, s) for image in some for s in POINTS])
    return {"edits/s": len(some) * len(POINTS) / seconds}


WORKERS = {"ours": ours, "theirs": theirs}


def report(results: dict[str, list[dict]], runs: int) -> str:
    """The table, in Markdown."""
    a, b = median(results["ours"]), median(results["theirs"])
    return "\n".join(
        [
            setting(runs),
            "",
            "| | ours, edits/s | diffusers, edits/s | time of an edit, ratio | peak memory |",
            "|---|---|---|---|---|",
            f"| small shape, {SIDE} px, {STEPS} steps, {len(POINTS)} points "
            f"| {a['edits/s']:.3g} | {b['edits/s']:.3g} | {b['edits/s'] / a['edits/s']:.2f} "
            f"| {a['peak GiB']:.1f} / {b['peak GiB']:.1f} GiB |",
            "",
            f"{len(POINTS)} evaluations of one point take "
            f"{a['7 runs of 1 point / 1 of 7']:.2f} times as long as one of {len(POINTS)} points.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (5)")
    parser.add_argument("--output", default="benchmarks/evaluate.md")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](*args.models)))
        return
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sys.path.insert(0, str(ROOT))
        from tests import oracles

        model = oracles.tiny_folder(Path(scratch) / "model", in_channels=8)
        clip = oracles.tiny_clip(Path(scratch) / "clip")
        for i in range(args.runs):
            for worker in WORKERS:
                result = measure(
                    __file__, worker, "--models", str(model), str(clip), cache=f"{scratch}/cache"
                )
                results.setdefault(worker, []).append(result)
                print(f"run {i + 1} of {args.runs}: {worker} {result}", file=sys.stderr)
    text = report(results, args.runs)
    Path(args.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
