# SPDX-License-Identifier: Apache-2.0
"""Times the making of candidate pairs against torch doing it the authors' way.

  python benchmarks/pairs.py [--runs 5] [--sizes small full] [--output benchmarks/pairs.md]

Theirs is diffusers' UNet with an attention processor that writes out the scores of self-attention
and copies those of the first picture, one pair a call; ours is `data_gen.pairs`' compiled program.
Both: Euler ancestral, two-branch guidance, VAE decoder, CLIP of both pictures and captions;
float32, random weights, each measurement a process of its own, in turn. What is counted is
candidates a second once everything is loaded and compiled.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from processes import measure, median, setting

ROOT = Path(__file__).parent.parent
CAPTIONS = ("a photograph of a cat on a chair", "a photograph of a dog on a chair")


class Size(NamedTuple):
    """What is measured: pixels a side, sampling steps, candidates at once (ours), candidates."""

    side: int
    steps: int
    rows: int
    candidates: int


SIZES = {"small": Size(64, 20, 8, 16), "full": Size(256, 2, 2, 2)}


def ours(folder: str, clip_folder: str, size: Size) -> dict:
    import jax

    from data_gen.candidates import CandidateMaker, Recipe, Unit
    from data_gen.triplet_file import Triplet
    from ip2p_jax.cli import set_up_jax
    from ip2p_jax.evaluation.clip_scores import Clip
    from ip2p_jax.placed import place
    from ip2p_jax.weights.load import load

    set_up_jax()
    recipe = Recipe(steps=size.steps, height=size.side, width=size.side)
    maker = CandidateMaker(
        place(load(folder)), Clip.from_pretrained(clip_folder), recipe, size.rows
    )
    triplet = Triplet(CAPTIONS[0], "make it a dog", CAPTIONS[1])

    def make(blocks: range) -> None:
        made = [maker([Unit(0, block)], [triplet]) for block in blocks]
        jax.block_until_ready(made)

    make(range(1))
    return rate(lambda: make(range(size.candidates // size.rows)), size.candidates)


def rate(make, candidates: int) -> dict:
    """Candidates a second: the median of three goes."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        make()
        rates.append(candidates / (time.perf_counter() - start))
    return {"candidates/s": statistics.median(rates)}


def theirs(folder: str, clip_folder: str, size: Size) -> dict:
    import torch
    from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    tower = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    clip_tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    sharing = {"active": False}
    unet.set_attn_processor(score_copier(sharing))
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")

    def encode(texts):
        padded = tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
        return tower(padded.input_ids).last_hidden_state

    def candidate(p: float, scale: float) -> None:
        text = torch.cat([encode(["", ""]), encode(CAPTIONS)])
        shape = (
            1,
            vae.config.latent_channels,
            *[size.side // 2 ** (len(vae.config.block_out_channels) - 1)] * 2,
        )
        scheduler.set_timesteps(size.steps)
        z = torch.randn(shape).repeat(2, 1, 1, 1) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            sharing["active"] = i / max(size.steps - 1, 1) < p
            scaled = scheduler.scale_model_input(z, t).repeat(2, 1, 1, 1)
            none, both = unet(scaled, t, text).sample.chunk(2)
            z = scheduler.step(
                none + scale * (both - none), t, z, generator=torch.manual_seed(i)
            ).prev_sample
        x = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
        side = clip.config.vision_config.image_size
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        x = torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic")
        tokens = clip_tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
        clip(pixel_values=(x - mean) / std, **tokens)

    def make(count: int) -> None:
        with torch.no_grad():
            for i in range(count):
                candidate(0.1 + 0.8 * i / count, 7.5 + 7.5 * i / count)

    make(1)
    return rate(lambda: make(size.candidates), size.candidates)


def score_copier(sharing: dict):
    """An attention processor that writes the scores out, and in self-attention copies those of the
    first picture of each half over those of the second, as the released code does."""

    class Copier:
        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **_):
            context = x if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (
                attn.head_to_batch_dim(y)
                for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
            )
            scores = attn.scale * (q @ k.transpose(1, 2))
            if sharing["active"] and encoder_hidden_states is None:
                rows = scores.unflatten(0, (2, 2, -1))  # half, picture, head
                rows[:, 1] = rows[:, 0]
                scores = rows.flatten(0, 2)
            y = attn.batch_to_head_dim(scores.softmax(-1) @ v)
            return attn.to_out[1](attn.to_out[0](y))

    return Copier()


WORKERS = {"ours": ours, "theirs": theirs}


def write_models(scratch: Path, size: str) -> tuple[str, str]:
    """Random weights: SD 1.5's shape with ViT-L/14, or the small test shapes."""
    sys.path.insert(0, str(ROOT))
    from tests import oracles

    if size == "full":
        model = oracles.full_folder(scratch / "full", in_channels=4)
        return str(model), str(oracles.full_clip(scratch / "full-clip"))
    model = oracles.tiny_folder(scratch / "small", in_channels=4)
    return str(model), str(oracles.tiny_clip(scratch / "small-clip"))


def report(results: dict[str, dict[str, list[dict]]], runs: int) -> str:
    """The table, in Markdown."""
    lines = [
        setting(runs),
        "",
        "| | ours, candidates/s | torch, candidates/s | ratio | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, workers in results.items():
        a, b = median(workers["ours"]), median(workers["theirs"])
        fast, slow = a["candidates/s"], b["candidates/s"]
        size = SIZES[name]
        lines.append(
            f"| {name} shape, {size.side} px, {size.steps} steps | {fast:.4g} | {slow:.4g} | "
            f"{fast / slow:.2f} | {a['peak GiB']:.1f} / {b['peak GiB']:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", default="benchmarks/pairs.md")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](*args.models, SIZES[args.sizes[0]])))
        return
    results: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            models = write_models(Path(scratch), size)
            for i in range(args.runs):
                for worker in WORKERS:
                    result = measure(
                        __file__, worker, "--sizes", size, "--models", *models,
                        cache=f"{scratch}/cache",
                    )  # fmt: skip
                    results.setdefault(size, {}).setdefault(worker, []).append(result)
                    print(f"run {i + 1} of {args.runs}: {size} {worker} {result}", file=sys.stderr)
    text = report(results, args.runs)
    Path(args.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
