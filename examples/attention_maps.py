# SPDX-License-Identifier: Apache-2.0
"""Draws where a text-to-image model looks for each word of a prompt.

  python examples/attention_maps.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --prompt "a photograph of a cat on a red mat" --output maps.png

Makes the picture and draws it beside the cross-attention map of each word, the mean over all steps,
layers and heads. The same maps are written as arrays "words" and "maps" (word, height, width)
to a .npz beside it.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from data_gen.attention_maps import (
    draw_maps,
    guide_hooked,
    map_size,
    mean_maps,
    record_cross_attention,
)
from data_gen.words import word_tokens
from ip2p_jax import checks
from ip2p_jax.cli import Parser, atomic_path, one_line_errors, set_up_jax
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.samplers import SAMPLERS, Sampler
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.guided import Pictures, TextBatch, decode
from ip2p_jax.networks import Networks
from ip2p_jax.placed import Placed, place
from ip2p_jax.sizes import check_size
from ip2p_jax.types import Params
from ip2p_jax.weights.load import load


def generate(
    size: tuple[int, int],
    sample: Sampler,
    schedule: Schedule,
    networks: Networks,
    scaling: float,
    params: Params,
    batch: TextBatch,
    points: Grid,
) -> tuple[Pictures, jax.Array]:
    """As `guided.generate`, and the mean maps "picture h w token" of this size."""
    encode = nnx.merge(networks.text, params["text"])
    store = jax.new_ref(jnp.zeros((len(batch.tokens), *size, batch.tokens.shape[1])))

    def unet(z, t, text, attend):
        return nnx.merge(networks.unet, params["unet"])(z, t, text, attend)

    denoise = guide_hooked(
        unet,
        schedule,
        points,
        encode(batch.tokens),
        encode(batch.negative),
        batch.text_guidance,
        lambda i: record_cross_attention(store),
    )
    z = sample(denoise, batch.noise, points, batch.keys)
    return decode(networks, scaling, params, z), mean_maps(store[...])


def make(
    model: Placed, prompt: str, batch: TextBatch, steps: int, sampler: str
) -> tuple[Image.Image, list[str], np.ndarray]:
    """The picture of a batch of one prompt, its words, and a map "h w" of each of them.

    The map of a word is the sum of its tokens'. Words that were cut off are left out.
    """
    size = map_size(model.config.unet, *batch.noise.shape[1:3])
    program = model.compile(functools.partial(generate, size), sampler, keep=False)
    pictures, maps = model.run(program, batch, model.grid(sampler, steps))
    places = word_tokens(prompt, model.tokenizer)
    words = [word for word, of_word in zip(prompt.split(), places, strict=True) if of_word]
    of_words = [maps[0][..., of_word].sum(-1) for of_word in places if of_word]
    return Image.fromarray(pictures.images[0]), words, np.stack(of_words)


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="text-to-image: hub id, folder, LDM file or run")
    p.add_argument("--prompt", required=True)
    p.add_argument("--output", required=True, help=".png file")
    p.add_argument("--steps", type=int, default=25, help="sampling steps (%(default)s)")
    p.add_argument("--sampler", default="dpmpp_2m", help=", ".join(SAMPLERS) + " (%(default)s)")
    p.add_argument("--text-guidance", type=float, default=7.5, help="s_T (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    p.add_argument("--resolution", type=int, help="side in px (the model's own)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError that names an option and what was expected."""
    checks.check("--steps", args.steps, checks.steps)
    checks.check("--sampler", args.sampler, checks.sampler)
    checks.check("--text-guidance", args.text_guidance, checks.number)
    checks.check("--seed", args.seed, checks.seed)
    if not args.prompt.split():
        raise ValueError("--prompt: expected at least one word")
    if Path(args.output).suffix.lower() != ".png":
        raise ValueError(f"--output: {args.output!r}, expected a .png file")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check(args)
    set_up_jax()
    pretrained = load(args.model)
    checks.generates(pretrained.config)
    model = place(pretrained, devices=jax.local_devices()[:1])
    side = args.resolution or model.resolution
    check_size((side, side), model.config.multiple)
    batch = model.text_batch(
        [args.prompt], [""], [args.text_guidance], [args.seed], None, (side, side)
    )
    picture, words, maps = make(model, args.prompt, batch, args.steps, args.sampler)
    figure = draw_maps(picture, words, maps)
    with atomic_path(args.output) as path:
        figure.savefig(path, format="png", dpi=100)
    with atomic_path(Path(args.output).with_suffix(".npz")) as path, path.open("wb") as file:
        np.savez_compressed(file, words=words, maps=maps)


if __name__ == "__main__":
    sys.exit(main())
