# SPDX-License-Identifier: Apache-2.0
"""Prompt-to-Prompt: two captions make two pictures of one structure (Hertz et al. 2022).

Both pictures of a pair are denoised in one batch under guidance. Its rows are "(pair picture
branch)": picture 0 is the first caption's, branch 0 the unconditional one. How the second picture
attends is said by hooks of the UNet (`ip2p_jax.models.attention.Attend`), each made from traced
values, so that one compiled program serves all of them, and each wrapped around another:

    def hook(i):  # in step i
        shared = share_self_attention(step_active(i, steps, p))
        return edit_cross_attention(lambda first, second: reweight(second, scale), shared)

    denoise = pair_denoise(unet, schedule, grid, text, null_text, guidance, hook)

No hook changes a first picture: it is what plain guidance makes of the first caption. The arrays
that say which word is which are made by `data_gen.words`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from data_gen.attention_maps import SMALL, Hook, HookedUNet, attention_map, guide_hooked
from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.diffusion.schedule import Schedule
from ip2p_jax.models.attention import Attend, Place, attend
from ip2p_jax.types import Denoise

MapEdit = Callable[
    [Float[Array, "pairs k n m"], Float[Array, "pairs k n m"]], Float[Array, "pairs k n m"]
]
"""`edit(first, second)`: the cross-attention maps that second pictures shall use, given both
pictures' own; k heads, n positions, m tokens."""


def pair_denoise(
    unet: HookedUNet,
    schedule: Schedule,
    grid: Grid,
    text: Float[Array, "rows n e"],
    null_text: Float[Array, "n e"],
    scale: Float[Array, " pairs"],
    hook: Hook,
) -> Denoise:
    """Text guidance of pairs of pictures that see each other.

    text: states of the captions, rows "(pair picture)" as those of the latents that are denoised.
    null_text: states of the empty caption. scale: the guidance scale of each pair. grid: that of
    the sampler. For pictures that differ by their captions alone, both rows of a pair start from
    the same noise and have the same key.
    """
    null = jnp.broadcast_to(null_text[None], text.shape)
    return guide_hooked(unet, schedule, grid, text, null, jnp.repeat(scale, 2), hook)


def share_until(p: Float[Array, " pairs"], steps: int, base: Attend = attend) -> Hook:
    """The hook of the InstructPix2Pix data: self-attention is shared while i / (steps - 1) < p."""
    return lambda i: share_self_attention(step_active(i, steps, p), base)


def step_active(i: Int[Array, ""], steps: int, p: Float[Array, " pairs"]) -> Bool[Array, " pairs"]:
    """Whether i / (steps - 1) < p: never in the last step; in an only step whenever p > 0.

    The quotients are those of the host, which rounds them right; an accelerator need not.
    """
    fractions = np.arange(steps, dtype=np.float32) / max(steps - 1, 1)
    return jnp.asarray(fractions)[i] < p


def step_within(
    i: Int[Array, ""], steps: int, start: Float[Array, " pairs"], end: Float[Array, " pairs"]
) -> Bool[Array, " pairs"]:
    """Whether start <= i / steps < end: the windows of the Prompt-to-Prompt paper."""
    fraction = jnp.asarray(np.arange(steps, dtype=np.float32) / steps)[i]
    return (start <= fraction) & (fraction < end)


def share_self_attention(active: Bool[Array, " pairs"], base: Attend = attend) -> Attend:
    """Self-attention of the second pictures of `active` pairs by the maps of the first.

    At every resolution and in both branches (the InstructPix2Pix authors' variant). To attend with
    the first picture's queries and keys is to copy its maps, before or after the softmax, and no
    map is ever written out.
    """
    return self_attention_of_first(active[:, None], None, base)


def inject_self_attention(
    active: Bool[Array, " pairs"], base: Attend = attend, most: int = SMALL
) -> Attend:
    """The same in the conditional branch, and on at most `most` positions (the paper's code)."""
    return self_attention_of_first(active[:, None] & jnp.array([[False, True]]), most, base)


def self_attention_of_first(
    active: Bool[Array, "pairs #branches"], most: int | None, base: Attend
) -> Attend:
    """Gives the second pictures of `active` pairs and branches the first's queries and keys."""

    def of_first(x: Float[Array, "rows n k d"]) -> Float[Array, "rows n k d"]:
        x = rearrange(x, "(p i g) n k d -> p i g n k d", i=2, g=2)
        second = jnp.where(active[:, :, None, None, None], x[:, 0], x[:, 1])
        return rearrange([x[:, 0], second], "i p g n k d -> (p i g) n k d")

    def hooked(place: Place, q, k, v):
        if place.cross or (most is not None and place.height * place.width > most):
            return base(place, q, k, v)
        return base(place, of_first(q), of_first(k), v)

    return hooked


def edit_cross_attention(edit: MapEdit, base: Attend = attend) -> Attend:
    """Cross-attention of the second pictures' conditional rows by edited maps; else `base`."""

    def hooked(place: Place, q, k, v):
        out = base(place, q, k, v)
        if not place.cross:
            return out
        maps = edit(attention_map(q[1::4], k[1::4]), attention_map(q[3::4], k[3::4]))
        edited = jnp.einsum("pknm,pmkd->pnkd", maps.astype(v.dtype), v[3::4])
        pairs = rearrange(out, "(p four) n k d -> p four n k d", four=4)
        return rearrange(pairs.at[:, 3].set(edited), "p four n k d -> (p four) n k d")

    return hooked


def take_over(
    first: Float[Array, "pairs k n m"],
    second: Float[Array, "pairs k n m"],
    mapper: Float[Array, "pairs m m"],
    share: Float[Array, "pairs m"],
) -> Float[Array, "pairs k n m"]:
    """Replacement and refinement: the first picture's maps for the second caption's tokens.

    mapper[i, j] is how much of the map of the first caption's token i goes to the second's token j,
    share[j] how much of that is used, the rest being token j's own map (section 3.2: word swap,
    adding a new phrase). In a word's window share is `Alignment.aligned`, else 0.
    """
    taken = jnp.einsum("bkni,bij->bknj", first, mapper)
    share = share[:, None, None, :]
    return share * taken + (1 - share) * second


def reweight(
    maps: Float[Array, "pairs k n m"], scale: Float[Array, "pairs m"]
) -> Float[Array, "pairs k n m"]:
    """Multiplies the map of token j by scale[j] (section 3.2: attention re-weighting).

    The rows no longer add up to one, as in the paper; scales may be negative.
    """
    return maps * scale[:, None, None, :]


def local_blend(
    z: Float[Array, "rows h w c"],
    maps: Float[Array, "rows H W n"],
    words: Float[Array, "rows n"],
    threshold: Float[Array, " pairs"],
) -> Float[Array, "rows h w c"]:
    """Makes the second pictures the first's but where either attends to its words.

    Rows "(pair picture)". words: 1 at the tokens of the words in each caption. maps: recorded up to
    now; their sum is as good as their mean. The words' maps are max-pooled over 3x3, resized, and
    count where they are above `threshold` (paper: 0.3) times their highest value (algorithm 1).

    It is to be a sampler's `after`: blending z0 alone, inside `denoise`, is not the same. A place
    that leaves the mask must be equal at once, and would by z0 become so only step by step.
    """
    factor = z.shape[1] // maps.shape[1]
    of_words = jnp.einsum("bhwn,bn->bhw", maps, words)
    pooled = jax.lax.reduce_window(of_words, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
    highest = jnp.max(pooled, axis=(1, 2), keepdims=True)
    inside = pooled > jnp.repeat(threshold, 2)[:, None, None] * highest
    inside = repeat(inside, "b h w -> b (h i) (w j)", i=factor, j=factor)
    union = jnp.any(rearrange(inside, "(p two) h w -> p two h w", two=2), axis=1)
    first, second = rearrange(z, "(p two) h w c -> two p h w c", two=2)
    blended = jnp.where(union[..., None], second, first)
    return rearrange([first, blended], "two p h w c -> (p two) h w c")
