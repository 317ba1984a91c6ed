# SPDX-License-Identifier: Apache-2.0
"""From a batch of texts to pictures under guidance: what one compiled program computes.

Pure functions of parameters, batch and grid. Both share their first arguments: `sample` and
`schedule` say how, `networks` with `params` what denoises, `scaling` is the VAE's factor.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8

from ip2p_jax.diffusion.denoise import (
    Network,
    Rescale,
    as_guided,
    denoiser,
    guide_edit,
    guide_text,
    limited,
    one_batch,
    rescaled,
)
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.samplers import Sampler
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.networks import Networks, to_pixels, to_uint8
from ip2p_jax.types import Conditioning, Denoise, Params


class TextBatch(NamedTuple):
    """What pictures are made from: one row per picture, all of one size."""

    tokens: Int32[Any, "b n"]
    negative: Int32[Any, "b n"]
    text_guidance: Float32[Any, " b"]
    noise: Float32[Any, "b h w z"]
    keys: Key[Array, " b"]
    rescale: Float32[Any, " b"] | None = None  # share of guidance rescale, 0 to 1; None: as 0


class EditBatch(NamedTuple):
    """The same, and the pictures to edit."""

    text: TextBatch
    images: UInt8[Any, "b h w 3"]
    image_guidance: Float32[Any, " b"]


class Pictures(NamedTuple):
    """The result of a batch: pictures, and the scaled latents they were decoded from."""

    images: UInt8[Any, "b h w 3"]
    latents: Float32[Any, "b h w z"]


class Encoded(NamedTuple):
    """What the UNet is conditioned on, with and without the text."""

    cond: Conditioning
    null_text: Float[Array, "b n c"]


def encode_text(networks: Networks, params: Params, batch: TextBatch) -> Encoded:
    """Encodes what a text-to-image model is conditioned on: its image has no channels."""
    encode = nnx.merge(networks.text, params["text"])
    no_image = jnp.zeros((*batch.noise.shape[:-1], 0))
    return Encoded(Conditioning(encode(batch.tokens), no_image), encode(batch.negative))


def encode_edit(networks: Networks, params: Params, batch: EditBatch) -> Encoded:
    """Encodes what an editing model is conditioned on: the image's latent is a mean, unscaled."""
    text, null_text = encode_text(networks, params, batch.text)
    vae = nnx.merge(networks.vae, params["vae"])
    return Encoded(text._replace(image=vae.encode(to_pixels(batch.images)).mean), null_text)


def generate(
    sample: Sampler,
    schedule: Schedule,
    networks: Networks,
    scaling: float,
    params: Params,
    batch: TextBatch,
    points: Grid,
) -> Pictures:
    """Samples pictures of texts (Rombach et al. 2022), guided by text alone, and decodes them."""
    encoded = encode_text(networks, params, batch)
    rescale = rescale_of(schedule, batch)
    scale = batch.text_guidance
    denoise = text_denoise(schedule, networks, params, encoded, scale, rescale, points.guided)
    z = sample(denoise, batch.noise, points, batch.keys)
    return decode(networks, scaling, params, z)


def edit(
    sample: Sampler,
    schedule: Schedule,
    networks: Networks,
    scaling: float,
    params: Params,
    batch: EditBatch,
    points: Grid,
) -> Pictures:
    """Encodes pictures, samples under two guidance scales, decodes (sections 3.2 and 3.2.1)."""
    encoded, scale = encode_edit(networks, params, batch), batch.image_guidance
    return edit_encoded(
        sample, schedule, networks, scaling, params, encoded, batch.text, scale, points
    )


def edit_encoded(
    sample: Sampler,
    schedule: Schedule,
    networks: Networks,
    scaling: float,
    params: Params,
    encoded: Encoded,
    text: TextBatch,
    image_guidance: Float[Array, "b"],
    points: Grid,
) -> Pictures:
    """The same of what has been encoded; the tokens of `text` are not used."""
    scales = text.text_guidance, image_guidance
    rescale = rescale_of(schedule, text)
    denoise = edit_denoise(schedule, networks, params, encoded, *scales, rescale, points.guided)
    z = sample(denoise, text.noise, points, text.keys)
    return decode(networks, scaling, params, z)


def rescale_of(schedule: Schedule, batch: TextBatch) -> Rescale:
    """How a batch is rescaled."""
    return as_guided if batch.rescale is None else rescaled(schedule, batch.rescale)


def text_denoise(
    schedule: Schedule,
    networks: Networks,
    params: Params,
    encoded: Encoded,
    text_guidance: Float[Array, "b"],
    rescale: Rescale = as_guided,
    interval: Float[Array, "2"] | None = None,
) -> Denoise:
    """The UNet as a denoiser that is guided by text alone, at the noise levels of the interval."""
    denoise = denoiser(one_batch(unet(networks, params), networks.by_row), schedule)
    guided = guide_text(denoise, *encoded, text_guidance, rescale)
    return limited(guided, lambda z, sigma: denoise(z, sigma, encoded.cond), interval)


def edit_denoise(
    schedule: Schedule,
    networks: Networks,
    params: Params,
    encoded: Encoded,
    text_guidance: Float[Array, "b"],
    image_guidance: Float[Array, "b"],
    rescale: Rescale = as_guided,
    interval: Float[Array, "2"] | None = None,
) -> Denoise:
    """The UNet as a denoiser that is guided by image and text, at the levels of the interval."""
    denoise = denoiser(one_batch(unet(networks, params), networks.by_row), schedule)
    guided = guide_edit(denoise, *encoded, text_guidance, image_guidance, rescale)
    return limited(guided, lambda z, sigma: denoise(z, sigma, encoded.cond), interval)


def unet(networks: Networks, params: Params) -> Network:
    """The UNet, merged where it is called: a loop over steps traces it inside."""
    return lambda z, t, text: nnx.merge(networks.unet, params["unet"])(z, t, text, networks.attend)


def decode(
    networks: Networks, scaling: float, params: Params, z: Float[Array, "b h w z"]
) -> Pictures:
    """Scaled latents, and the pictures that the VAE makes of them."""
    return Pictures(to_uint8(decode_pixels(networks, scaling, params, z)), z)


def decode_pixels(
    networks: Networks, scaling: float, params: Params, z: Float[Array, "b h w z"]
) -> Float[Array, "b height width 3"]:
    """What the VAE makes of scaled latents: pixels, about in [-1, 1], neither cut nor rounded."""
    return nnx.merge(networks.vae, params["vae"]).decode(z / scaling)


@jax.jit
def seed_keys(seeds: Any) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """Two keys a picture: for the start noise and for the noise of the steps."""
    return tuple(jax.vmap(lambda s: jax.random.split(jax.random.key(s)), out_axes=1)(seeds))
