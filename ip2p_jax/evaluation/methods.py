# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: InstructPix2Pix, and SDEdit with a text-to-image model.

A method is two pure functions, so that what does not change from one point of a curve to the next
is computed once an example: `encode(params, rows)`, and `sample(params, start, values, grid)`.
`axis` is what changes along a curve besides the text guidance, `useful` its usual points, `text` of
a turn what its picture is edited by.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8, UInt32

from ip2p_jax import checks, guided
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation.examples import Turn
from ip2p_jax.guided import EditBatch, Encoded, TextBatch
from ip2p_jax.networks import to_pixels
from ip2p_jax.placed import Placed
from ip2p_jax.types import Params


class Recipe(NamedTuple):
    """How pictures are made, whatever the method; the defaults are the paper's."""

    steps: int = 100
    sampler: str = "euler_ancestral"
    seed: int = 0


class Rows(NamedTuple):
    """Examples: the pictures to edit, the method's text for each, and which example it is."""

    images: UInt8[Any, "b h w 3"]
    tokens: Int32[Any, "b n"]
    index: UInt32[Any, " b"]
    turn: UInt32[Any, " b"]


class Values(NamedTuple):
    """A point of the curve, for each row: s_T, and s_I or the strength."""

    text_guidance: Float32[Any, " b"]
    other: Float32[Any, " b"]


class Start(NamedTuple):
    """What is known of examples before any point of the curve: conditioning and noise."""

    encoded: Encoded
    latent: Float[Array, "b h w z"]  # of the pictures, scaled; only SDEdit starts from it
    noise: Float[Array, "b h w z"]
    keys: Key[Array, " b"]


def example_keys(seed: int, rows: Rows) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """Two keys a row, for start noise and steps: they depend on seed, example and turn alone."""

    def row(index, turn):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.split(jax.random.fold_in(key, turn))

    return tuple(jax.vmap(row, out_axes=1)(rows.index, rows.turn))


class InstructPix2Pix:
    """Edits by instruction; a curve goes along the image guidance (figure 8)."""

    name, axis = "ip2p", "image_guidance"
    check = staticmethod(checks.edits)
    useful = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)

    def __init__(self, model: Placed, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.null = model.tokenize([""])[0]

    def text(self, turn: Turn) -> str:
        return turn.instruction

    def grid(self, value: float) -> Grid:
        """The same for every image guidance."""
        return self.model.grid(self.recipe.sampler, self.recipe.steps)

    def encode(self, params: Params, rows: Rows) -> Start:
        text = text_batch(self.model, self.null, self.recipe.seed, rows)
        images = EditBatch(text, rows.images, jnp.zeros(len(rows.index)))
        encoded = guided.encode_edit(self.model.networks, params, images)
        return Start(encoded, jnp.zeros_like(text.noise), text.noise, text.keys)

    def sample(
        self, params: Params, start: Start, values: Values, grid: Grid
    ) -> Float[Array, "b h w z"]:
        model = self.model
        denoise = guided.edit_denoise(
            model.schedule, model.networks, params, start.encoded, *values
        )
        return SAMPLERS[self.recipe.sampler](denoise, start.noise, grid, start.keys)


class SDEdit:
    """Noise on the picture, then denoising by the output caption (Meng et al. 2021).

    A curve goes along the strength: how far up the noise goes, 1 forgetting the picture. As in
    diffusers' img2img the last int(steps * strength) steps of the grid are made; the latent of the
    picture is the mean.
    """

    name, axis = "sdedit", "strength"
    check = staticmethod(checks.generates)
    useful = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __init__(self, model: Placed, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.null = model.tokenize([""])[0]

    def text(self, turn: Turn) -> str:
        if turn.output_caption is None:
            raise ValueError("SDEdit is given the output caption, and there is none")
        return turn.output_caption

    def grid(self, value: float) -> Grid:
        """The last part of the model's grid; ValueError if no step is left of it."""
        return tail(self.model.grid(self.recipe.sampler, self.recipe.steps), value)

    def encode(self, params: Params, rows: Rows) -> Start:
        text = text_batch(self.model, self.null, self.recipe.seed, rows)
        encoded = guided.encode_text(self.model.networks, params, text)
        vae = nnx.merge(self.model.networks.vae, params["vae"])
        latent = vae.encode(to_pixels(rows.images)).mean * self.model.config.vae.scaling_factor
        return Start(encoded, latent, text.noise, text.keys)

    def sample(
        self, params: Params, start: Start, values: Values, grid: Grid
    ) -> Float[Array, "b h w z"]:
        model = self.model
        denoise = guided.text_denoise(
            model.schedule, model.networks, params, start.encoded, values.text_guidance
        )
        noisy = start.latent + grid.sigmas[0] * start.noise
        return SAMPLERS[self.recipe.sampler](denoise, noisy, grid, start.keys)


Method = InstructPix2Pix | SDEdit

METHODS: dict[str, type[InstructPix2Pix] | type[SDEdit]] = {
    method.name: method for method in (InstructPix2Pix, SDEdit)
}


def tail(grid: Grid, strength: float) -> Grid:
    """The last int(steps * strength) steps of a grid, which start from a latent of their own."""
    steps = len(grid.sigmas) - 1
    kept = int(steps * strength)
    if kept < 1 or strength > 1:
        raise ValueError(
            f"strength {strength:g}: leaves {kept} of {steps} steps, expected over 0 and up to 1"
        )
    return grid._replace(sigmas=grid.sigmas[steps - kept :], start=grid.start * 0 + 1)


def text_batch(model: Placed, null: Int32[Any, " n"], seed: int, rows: Rows) -> TextBatch:
    """The rows as a batch of texts with noise; the guidance comes with the point."""
    noise_keys, step_keys = example_keys(seed, rows)
    (b, h, w, _), vae = rows.images.shape, model.config.vae
    return TextBatch(
        tokens=rows.tokens,
        negative=jnp.broadcast_to(jnp.asarray(null)[None], rows.tokens.shape),
        text_guidance=jnp.zeros(b),
        noise=unit_noise(noise_keys, (h // vae.factor, w // vae.factor, vae.latent_channels)),
        keys=step_keys,
    )
