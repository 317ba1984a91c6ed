# SPDX-License-Identifier: Apache-2.0
"""Times one UNet call and a whole edit against diffusers on torch, in full SD 1.5 size.

  python benchmarks/edit.py [--runs 5] [--folder MODEL] [--output benchmarks/edit.md]

Float32, 256 px, random weights (time does not depend on them; the folder is written if not given).
Every measurement is a process of its own, ours and theirs in turn, so that a machine whose speed
drifts is fair to both; medians and their ratio are reported, with peak memory. "Cold" starts with
an empty compilation cache, "warm" with that of the run before. A whole edit includes starting
Python, imports, opening the weights, 10 steps with 3 guidance branches, and writing the picture.
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

CALLS = 5  # UNet calls in one process, after a first one that is not counted
STEPS = 10
SIZE = 256
INSTRUCTION = "make it winter"


def unet_ours(folder: str) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ip2p_jax.cli import set_up_jax
    from ip2p_jax.models.layers import abstract
    from ip2p_jax.models.unet import UNet
    from ip2p_jax.weights.load import load

    set_up_jax()
    model = load(folder)
    graphdef, _ = abstract(UNet, model.config.unet)
    params = jax.device_put(model.params["unet"])
    call = jax.jit(lambda p, *args: nnx.merge(graphdef, p)(*args))
    keys = jax.random.split(jax.random.key(0))
    z = jax.random.normal(keys[0], (3, SIZE // 8, SIZE // 8, 8))
    text = jax.random.normal(keys[1], (3, 77, 768))
    t = jnp.full(3, 500.0)
    return times(lambda: call(params, z, t, text).block_until_ready())


def unet_theirs(folder: str) -> dict:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(os.cpu_count() or 1)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    z, text = torch.randn(3, 8, SIZE // 8, SIZE // 8), torch.randn(3, 77, 768)
    with torch.no_grad():
        return times(lambda: unet(z, torch.full((3,), 500), text))


def times(call) -> dict:
    """Seconds of `CALLS` calls after the first."""
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"call": statistics.median(seconds)}


def edit_ours(folder: str) -> dict:
    from PIL import Image

    from ip2p_jax.cli import set_up_jax
    from ip2p_jax.editor import Editor

    spent = Stopwatch("imports")
    set_up_jax()
    editor = Editor.from_pretrained(folder)
    spent.lap("opening the weights")
    options = dict(steps=STEPS, sampler="ddim", resolution=SIZE)
    image = Image.open(photo(folder))
    [result] = editor(image, INSTRUCTION, **options)
    spent.lap("first edit, with tracing and compiling")
    result.save(Path(folder) / "ours.png")
    editor(image, INSTRUCTION, **options)
    spent.lap("a second edit (not counted in the whole)", counted=False)
    return spent.result()


def edit_theirs(folder: str) -> dict:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    spent = Stopwatch("imports")
    torch.set_num_threads(os.cpu_count() or 1)
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    spent.lap("opening the weights")
    image = Image.open(photo(folder)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    options = dict(num_inference_steps=STEPS, image_guidance_scale=1.5)
    pipe(INSTRUCTION, image, **options).images[0].save(Path(folder) / "theirs.png")
    spent.lap("first edit, with tracing and compiling")
    pipe(INSTRUCTION, image, **options)
    spent.lap("a second edit (not counted in the whole)", counted=False)
    return spent.result()


class Stopwatch:
    """Seconds since the process began, by section."""

    def __init__(self, first: str):
        started = float(os.environ["STARTED"])
        self.last, self.sections, self.whole = started, {}, 0.0
        self.lap(first)

    def lap(self, name: str, *, counted: bool = True) -> None:
        now = time.time()
        self.sections[name] = now - self.last
        self.whole += (now - self.last) * counted
        self.last = now

    def result(self) -> dict:
        return {"whole": self.whole, **self.sections}


WORKERS = {
    "unet-ours": unet_ours,
    "unet-theirs": unet_theirs,
    "edit-ours": edit_ours,
    "edit-theirs": edit_theirs,
}


def photo(folder: str) -> Path:
    """A real photograph beside the model."""
    path = Path(folder) / "photo.png"
    if not path.exists():
        import skimage.data
        from PIL import Image

        Image.fromarray(skimage.data.astronaut()).save(path)
    return path


def report(results: dict[str, list[dict]], runs: int) -> str:
    """The table, in Markdown."""
    m = {name: median(values) for name, values in results.items()}
    call, whole = m["unet-theirs"], m["edit-theirs"]

    def row(name: str, ours: dict, theirs: dict, key: str) -> str:
        return (
            f"| {name} | {ours[key]:.2f} s | {theirs[key]:.2f} s | {ours[key] / theirs[key]:.2f} "
            f"| {ours['peak GiB']:.1f} / {theirs['peak GiB']:.1f} GiB |"
        )

    lines = [
        setting(runs),
        "",
        "| | ours | diffusers | ratio | peak memory |",
        "|---|---|---|---|---|",
        row(f"UNet call, 3 branches, {SIZE} px", m["unet-ours"], call, "call"),
        row(f"{STEPS}-step edit, cold cache", m["edit-cold"], whole, "whole"),
        row(f"{STEPS}-step edit, warm cache", m["edit-warm"], whole, "whole"),
        "",
        "Where the seconds of an edit go:",
        "",
        "| | ours, cold | ours, warm | diffusers |",
        "|---|---|---|---|",
    ]
    for name in m["edit-warm"]:
        if name not in ("whole", "peak GiB"):
            cold, warm, theirs = (m[x][name] for x in ("edit-cold", "edit-warm", "edit-theirs"))
            lines.append(f"| {name} | {cold:.1f} | {warm:.1f} | {theirs:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (5)")
    parser.add_argument("--folder", help="diffusers folder in SD 1.5's size, 8 channels")
    parser.add_argument("--output", default="benchmarks/edit.md")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or f"{scratch}/model"
        if not args.folder:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from tests.oracles import full_folder

            full_folder(folder)
        photo(folder)
        results: dict[str, list[dict]] = {}
        for i in range(args.runs):
            cache = f"{scratch}/cache-{i}"
            for name, worker in (
                ("unet-ours", "unet-ours"),
                ("unet-theirs", "unet-theirs"),
                ("edit-cold", "edit-ours"),
                ("edit-warm", "edit-ours"),
                ("edit-theirs", "edit-theirs"),
            ):
                result = measure(__file__, worker, "--folder", folder, cache=cache)
                results.setdefault(name, []).append(result)
                print(f"run {i + 1} of {args.runs}: {name} {result}", file=sys.stderr)
    text = report(results, args.runs)
    Path(args.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
