# SPDX-License-Identifier: Apache-2.0
"""From caption pairs to scored candidate pictures: one compiled program (section 3.1.2).

A candidate is known by (seed, prompt, candidate): both pictures start from the same noise and share
the noise of every step; p and the guidance scale are drawn from the same key. Work is cut into
units of `rows` candidates of one prompt, and a device computes one unit at a time, so that a
candidate is the same bit for bit whatever else is made, on any number of devices and hosts (on the
CPU: in processes of equally many threads).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, UInt8, UInt32

from data_gen.prompt_to_prompt import pair_denoise, share_until
from data_gen.triplet_file import Triplet
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation.clip_scores import Clip, ClipScores, clip_scores, embed_images, embed_texts
from ip2p_jax.networks import to_uint8
from ip2p_jax.placed import Placed
from ip2p_jax.types import Params


class Recipe(NamedTuple):
    """How candidates are drawn; defaults are the paper's."""

    steps: int = 100
    sampler: str = "euler_ancestral"
    height: int = 512
    width: int = 512
    seed: int = 0
    p: tuple[float, float] = (0.1, 0.9)  # range of the share of steps that share self-attention
    scale: tuple[float, float] = (7.5, 15.0)  # range of the guidance scale


class Unit(NamedTuple):
    """Candidates `block * rows` and following of one prompt."""

    prompt: int
    block: int


class Texts(NamedTuple):
    """Tokens of both captions of each row, for the model and for CLIP."""

    model: Int32[Any, "b 2 n"]
    clip: Int32[Any, "b 2 m"]


class Rows(NamedTuple):
    """What tells one row from another; all else is the same for every batch."""

    prompt: UInt32[Any, " b"]
    candidate: UInt32[Any, " b"]
    texts: Texts


class Drawn(NamedTuple):
    """Random values of candidates, each row from its own keys."""

    noise: Key[Array, " b"]
    steps: Key[Array, " b"]
    p: Float[Array, " b"]
    scale: Float[Array, " b"]


class Made(NamedTuple):
    """A batch of candidates: pictures before and after, how they were made, how they score."""

    pictures: UInt8[Any, "b 2 h w 3"]
    p: Float[Any, " b"]
    scale: Float[Any, " b"]
    scores: ClipScores


def draw(recipe: Recipe, prompt: UInt32[Array, " b"], candidate: UInt32[Array, " b"]) -> Drawn:
    """Draws p ~ U(range) and scale ~ U(range) of each row, and keys for its noise."""

    def row(prompt, candidate):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), prompt), candidate)
        noise, steps, p, scale = jax.random.split(key, 4)
        p = jax.random.uniform(p, minval=recipe.p[0], maxval=recipe.p[1])
        scale = jax.random.uniform(scale, minval=recipe.scale[0], maxval=recipe.scale[1])
        return Drawn(noise, steps, p, scale)

    return jax.vmap(row)(prompt, candidate)


class CandidateMaker:
    """Makes and scores candidates with a text-to-image model and CLIP, one unit a device."""

    def __init__(self, model: Placed, clip: Clip, recipe: Recipe, rows: int):
        self.model, self.clip, self.recipe, self.rows = model, clip, recipe, rows
        self.null = model.tokenize([""])[0]
        points = model.grid(recipe.sampler, recipe.steps)
        self.points: Grid = jax.device_put(points, model.replicated)
        self.program = jax.jit(self.make, out_shardings=model.by_row)

    @property
    def units(self) -> int:
        """Units that are computed at once."""
        return self.model.devices

    def __call__(self, units: Sequence[Unit], triplets: Sequence[Triplet]) -> Made:
        """Starts computing at most `units` units, `triplets[i]` being that of `units[i]`.

        Returns device arrays of `rows` rows a unit, and at least one unit a device: the rows after
        the given units repeat the last one, and are to be left alone.
        """
        filled = [*range(len(units)), *[len(units) - 1] * (self.units - len(units))]
        captions = [text for t in triplets for text in (t.input, t.output)]
        texts = Texts(
            *(
                repeat(
                    rearrange(tokens, "(unit two) n -> unit two n", two=2)[filled],
                    "unit two n -> (unit row) two n",
                    row=self.rows,
                )
                for tokens in (self.model.tokenize(captions), self.clip.tokenize(captions))
            )
        )
        prompt = np.repeat(np.array([units[i].prompt for i in filled], np.uint32), self.rows)
        first = np.array([units[i].block * self.rows for i in filled], np.uint32)
        candidate = (first[:, None] + np.arange(self.rows, dtype=np.uint32)[None]).reshape(-1)
        rows = jax.device_put(Rows(prompt, candidate, texts), self.model.by_row)
        return self.program(self.model.params, self.clip.params, rows, self.points)

    def make(self, params: Params, clip_params: Params, rows: Rows, points: Grid) -> Made:
        """The program: text, noise, both pictures under shared attention, VAE, CLIP."""
        drawn = draw(self.recipe, rows.prompt, rows.candidate)
        with jax.default_matmul_precision(self.model.precision):
            z = self.latents(params, rows, drawn, points)
            vae = nnx.merge(self.model.networks.vae, params["vae"])
            x = to_uint8(vae.decode(z / self.model.config.vae.scaling_factor))
        pictures = rearrange(x, "(b two) h w c -> b two h w c", two=2)
        flat = rearrange(pictures, "b two h w c -> (b two) h w c")
        tokens = rearrange(rows.texts.clip, "b two n -> (b two) n")
        images = embed_images(self.clip.graphdef, clip_params, flat)
        texts = embed_texts(self.clip.graphdef, clip_params, tokens)
        images, texts = (rearrange(x, "(b two) e -> two b e", two=2) for x in (images, texts))
        return Made(pictures, drawn.p, drawn.scale, clip_scores(*images, *texts))

    def latents(
        self, params: Params, rows: Rows, drawn: Drawn, points: Grid
    ) -> Float[Array, "b2 h w z"]:
        """Those of both pictures of each row, one after the other."""
        config, networks = self.model.config, self.model.networks
        encode = nnx.merge(networks.text, params["text"])

        def unet(z, t, text, attend):
            return nnx.merge(networks.unet, params["unet"])(z, t, text, attend)

        captions = rearrange(rows.texts.model, "b two n -> (b two) n")
        denoise = pair_denoise(
            unet,
            self.model.schedule,
            points,
            encode(captions),
            encode(jnp.asarray(self.null)[None])[0],
            drawn.scale,
            share_until(drawn.p, len(points.sigmas) - 1, networks.attend),
        )
        shape = (self.recipe.height // config.vae.factor, self.recipe.width // config.vae.factor)
        noise = unit_noise(drawn.noise, (*shape, config.vae.latent_channels))
        return SAMPLERS[self.recipe.sampler](denoise, both(noise), points, both(drawn.steps))


def both(x: Array) -> Array:
    """Each row twice: the same for both pictures of a pair."""
    return jnp.repeat(x, 2, axis=0)
