# SPDX-License-Identifier: Apache-2.0
"""Times a training step against diffusers' on torch.

  python benchmarks/train.py [--runs 3] [--sizes small half full] [--output benchmarks/train.md]

Theirs is the step of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py: VAE of both
pictures, text tower, dropout of the conditions, UNet, gradient clipped at 1, AdamW, EMA. Ours is
`ip2p_jax.train`'s step from pictures, clipped too. Same networks, same batch, float32, random
weights (time does not depend on them); each measurement is a process of its own, ours and theirs in
turn. "half" is SD 1.5 with half its channels; "full" needs about 24 GiB. A save, of the small
model, goes on in the background: it holds up the loop until the next step begins, and where steps
share the cores with it, they take longer meanwhile.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from processes import measure, median, setting

ROOT = Path(__file__).parent.parent
STEPS = 5  # that are timed, after two that are not
SAVES, BETWEEN = 3, 8  # saves, and steps after each
INSTRUCTIONS = ("make it winter", "turn it into a painting", "add a boat", "make it night")


class Size(NamedTuple):
    """What is measured: pixels a side, rows of a step, and the UNet's channels."""

    side: int
    rows: int
    channels: tuple[int, ...]


SIZES = {
    "small": Size(64, 16, (32, 64, 96)),
    "half": Size(256, 2, (160, 320, 640, 640)),
    "full": Size(256, 1, (320, 640, 1280, 1280)),
}


def pictures(size: Size):
    """Random uint8 pictures, inputs and outputs."""
    import numpy as np

    shape = (2, size.rows, size.side, size.side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def texts(size: Size) -> list[str]:
    return [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(size.rows)]


class Loop(NamedTuple):
    """Our training step, to be called again and again."""

    advance: Callable[[], None]
    state: Callable[[], Any]
    cfg: Any


def our_loop(folder: str, size: Size) -> Loop:
    import dataclasses

    import jax

    from ip2p_jax import config
    from ip2p_jax.cli import set_up_jax
    from ip2p_jax.data.tokens import tokenize
    from ip2p_jax.training import mesh, optim, runs, state
    from ip2p_jax.types import Batch

    set_up_jax()
    cfg = config.Config()
    cfg.model = config.Model(base=folder)
    cfg.data = dataclasses.replace(cfg.data, batch_size=size.rows, resolution=size.side)
    cfg.optim = dataclasses.replace(cfg.optim, accumulate=1, clip=1.0)
    devices = mesh.make_mesh(cfg.mesh)
    tokenizer = runs.open_sources(cfg.model).tokenizer
    with tempfile.TemporaryDirectory() as workdir:
        task = runs.prepare(cfg, workdir, True, devices).task
        tx = optim.make_optimizer(cfg.optim)
        shardings = mesh.state_shardings(devices, state.abstract_state(task.start, tx))
        everywhere = mesh.replicated(devices)
        frozen = mesh.put_whole(devices, task.frozen)
        current = state.init_state(task.start, tx, shardings)
    rows = mesh.rows_in_place(devices, size.rows)
    step = state.make_step(task.loss, tx, cfg.optim, rows, devices)
    step = state.jit_step(step, shardings, everywhere)
    batch = Batch(*pictures(size), tokenize(tokenizer, texts(size)))
    batch = mesh.put_batch(devices, batch)
    key = jax.device_put(jax.random.key(0), everywhere)

    def advance() -> None:
        nonlocal current
        current, metrics = step(current, frozen, batch, key)
        jax.block_until_ready(metrics)

    return Loop(advance, lambda: current, cfg)


def ours(folder: str, size: Size) -> dict:
    return times(our_loop(folder, size).advance)


def saving(folder: str, size: Size) -> dict:
    """Seconds of a step, and what a save in the background adds to the steps after it."""
    from ip2p_jax.training import checkpoint, saving

    advance, state, cfg = our_loop(folder, size)
    step, held_up, extra = times(advance)["step"], [], []
    with tempfile.TemporaryDirectory() as workdir:
        with checkpoint.open_manager(workdir, cfg.checkpoint) as manager:
            saver = saving.Saver(manager, cfg, dict, None)
            for _ in range(SAVES):
                start = time.perf_counter()
                saver.save(state(), print)
                held_up.append(time.perf_counter() - start)
                for _ in range(BETWEEN):
                    advance()
                extra.append(time.perf_counter() - start - BETWEEN * step)
                saver.settle(0, print)
    return {
        "step": step,
        "held up": statistics.median(held_up),
        "extra": statistics.median(extra),
    }


def theirs(folder: str, size: Size) -> dict:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    noises = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    ema = EMAModel(unet.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
    before, after = (
        torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() / 127.5 - 1 for x in pictures(size)
    )
    options = dict(padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    ids = tokenizer(texts(size), **options).input_ids
    null = text(tokenizer([""], **options).input_ids)[0]

    def advance() -> None:
        latents = vae.encode(after).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (size.rows,))
        noisy = noises.add_noise(latents, noise, t)
        states, image = text(ids)[0], vae.encode(before).latent_dist.mode()
        draw = torch.rand(size.rows)
        states = torch.where((draw < 0.1)[:, None, None], null, states)
        kept = 1 - (draw >= 0.05).to(image.dtype) * (draw < 0.15).to(image.dtype)
        image = kept[:, None, None, None] * image
        predicted = unet(torch.cat([noisy, image], dim=1), t, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()

    return times(advance)


def times(advance: Callable[[], None]) -> dict:
    """The median of the seconds of `STEPS` steps, and those of the first, which compiles."""
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        advance()
        seconds.append(time.perf_counter() - start)
    return {"step": statistics.median(seconds[2:]), "first": seconds[0]}


WORKERS = {"ours": ours, "theirs": theirs, "saving": saving}


def write_model(path: str, size: Size) -> None:
    """A diffusers folder of this size with random weights and 8 channels."""
    sys.path.insert(0, str(ROOT))
    from tests.oracles import full_folder, tiny_folder

    if size.side == 64:
        tiny_folder(path)
    else:
        full_folder(path, unet=dict(block_out_channels=size.channels))


def report(results: dict[str, dict[str, list[dict]]], runs: int) -> str:
    """The table, in Markdown."""
    lines = [
        setting(runs),
        "",
        "| | ours | diffusers | ratio | first step | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, of_size in results.items():
        size, m = SIZES[name], {who: median(values) for who, values in of_size.items()}
        a, b = m["ours"], m["theirs"]
        lines.append(
            f"| {name}: {size.rows} pairs of {size.side} px | {a['step']:.2f} s | {b['step']:.2f} s"
            f" | {a['step'] / b['step']:.2f} | {a['first']:.1f} / {b['first']:.1f} s "
            f"| {a['peak GiB']:.1f} / {b['peak GiB']:.1f} GiB |"
        )
    if saved := [median(x["saving"]) for x in results.values() if "saving" in x]:
        [s] = saved
        held, slower = (x / s["step"] for x in (s["held up"], s["extra"] - s["held up"]))
        lines += ["", f"A save of the small model holds up the loop for {held:.2f} steps, and the "]
        lines[-1] += f"{BETWEEN} steps after it take {slower:.2f} steps more than others."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind (3)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "half"])
    parser.add_argument("--output", default="benchmarks/train.md")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args.folder, SIZES[args.sizes[0]])))
        return
    results: dict[str, dict[str, list[dict]]] = {name: {} for name in args.sizes}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sizes:
            folder = f"{scratch}/{name}"
            write_model(folder, SIZES[name])
            workers = [w for w in WORKERS if w != "saving" or name == "small"]
            for i in range(args.runs):
                for worker in workers:
                    options = ("--sizes", name, "--folder", folder)
                    result = measure(__file__, worker, *options, cache=f"{scratch}/cache")
                    results[name].setdefault(worker, []).append(result)
                    print(f"{name}, run {i + 1} of {args.runs}: {worker} {result}", file=sys.stderr)
    text = report(results, args.runs)
    Path(args.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
