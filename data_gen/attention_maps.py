# SPDX-License-Identifier: Apache-2.0
"""Guidance under hooks, and maps: where in the picture each word of a caption is looked for.

In the jitted function that samples:

    store = jax.new_ref(jnp.zeros((pictures, *map_size(config.unet, h, w), tokens)))
    hook = lambda i: record_cross_attention(store)
    z = sample(guide_hooked(unet, schedule, grid, text, null_text, scale, hook), noise, grid, keys)
    maps = mean_maps(store[...])
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from PIL import Image

from ip2p_jax.diffusion.denoise import denoiser
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.models.attention import Attend, Place, attend
from ip2p_jax.models.presets import UNetConfig
from ip2p_jax.types import Conditioning, Denoise

HookedUNet = Callable[
    [Float[Array, "b h w c"], Float[Array, "b"], Float[Array, "b n e"], Attend],
    Float[Array, "b h w c"],
]
"""`unet(z, t, text, attend)`: a text-to-image UNet's raw output."""

Hook = Callable[[Int[Array, ""]], Attend]
"""`hook(i)`: how the UNet attends in step i, counted from 0."""

SMALL = 16 * 16
"""Maps of at most this many positions show the layout; the paper's code stores and injects them."""


def guide_hooked(
    unet: HookedUNet,
    schedule: Schedule,
    grid: Grid,
    text: Float[Array, "b n e"],
    null_text: Float[Array, "b n e"],
    scale: Float[Array, "b"],
    hook: Hook,
) -> Denoise:
    """Classifier-free guidance by text, as `guide_text`, with a UNet that attends by a hook.

    The hook sees the rows of all pictures, "(picture branch)", branch 0 being unconditional. Its
    step is found from sigma and the sampler's grid (for Heun, the step that begins there).
    """
    texts = rearrange([null_text, text], "branch b n e -> (b branch) n e")
    s = scale[:, None, None, None]

    def guided(z: Float[Array, "b h w c"], sigma: Float[Array, ""]) -> Float[Array, "b h w c"]:
        attend = hook(jnp.sum(grid.sigmas > sigma))
        denoise = denoiser(lambda z, t, text: unet(z, t, text, attend), schedule)
        z = jnp.repeat(z, 2, axis=0)
        z0 = denoise(z, sigma, Conditioning(texts, jnp.zeros((*z.shape[:3], 0))))
        none, given = rearrange(z0, "(b branch) h w c -> branch b h w c", branch=2)
        return none + s * (given - none)

    return guided


def attention_map(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"]
) -> Float[Array, "b k n m"]:
    """softmax(q k^T / sqrt(d)), written out in float32."""
    score = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(score * q.shape[-1] ** -0.5, axis=-1)


def map_size(unet: UNetConfig, height: int, width: int, most: int = SMALL) -> tuple[int, int]:
    """Height and width of the largest cross-attention maps of at most `most` positions.

    `height` and `width` are those of the latents: 64x64 in SD has maps of 16x16. Raises ValueError
    if there are none.
    """
    last = len(unet.channels) - 1  # attention is always on the lowest level, in the middle
    for level in range(last + 1):
        h, w = height >> level, width >> level
        if h * w <= most and (unet.attention[level] or level == last):
            return h, w
    raise ValueError(f"no attention of latents of {height}x{width} is on {most} positions or fewer")


def record_cross_attention(store: jax.Ref, base: Attend = attend) -> Attend:
    """Adds every conditional row's maps of one size to `store` "picture h w token".

    That is the mean over heads, once a layer and step, of the picture's own maps, before any edit.
    """
    _, height, width, _ = store.shape

    def hooked(place: Place, q, k, v):
        if place.cross and (place.height, place.width) == (height, width):
            maps = reduce(attention_map(q[1::2], k[1::2]), "b k n m -> b n m", "mean")
            store[...] += rearrange(maps, "b (h w) m -> b h w m", h=height)
        return base(place, q, k, v)

    return hooked


def mean_maps(total: Float[Array, "b h w n"]) -> Float[Array, "b h w n"]:
    """The mean over layers and steps of what was recorded: every map adds up to 1 over tokens."""
    return total / jnp.sum(total, axis=-1, keepdims=True)


def draw_maps(
    picture: Image.Image, words: Sequence[str], maps: Float[np.ndarray, "words h w"]
) -> Figure:
    """The picture, and beside it each word's map over it, scaled to its own highest value."""
    columns = min(4, 1 + len(words))
    rows = -(-(1 + len(words)) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    grey = picture.convert("L")
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(picture)
    for ax, word, values in zip(axes[1:], words, maps, strict=False):
        ax.set_title(word)
        ax.imshow(grey, cmap="gray")
        edges = (-0.5, picture.width - 0.5, picture.height - 0.5, -0.5)
        ax.imshow(values, cmap="magma", alpha=0.7, interpolation="bicubic", extent=edges, vmin=0)
    return figure
