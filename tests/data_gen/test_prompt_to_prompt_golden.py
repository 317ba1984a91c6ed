# SPDX-License-Identifier: Apache-2.0
"""Claim: every control, alone and with all others, makes the latents of an independent script.

The files are written by `make_prompt_to_prompt_golden.py`. One compiled program serves all cases.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from data_gen.attention_maps import record_cross_attention
from data_gen.prompt_to_prompt import (
    edit_cross_attention,
    inject_self_attention,
    local_blend,
    pair_denoise,
    reweight,
    share_self_attention,
    step_active,
    step_within,
    take_over,
)
from data_gen.words import equalizer, refinement, replacement, windows, word_mask
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.samplers import sample_euler
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from tests.data_gen.pair_cases import (
    CASES,
    GUIDANCE,
    MAPS,
    MOST,
    STEPS,
    TOKENS,
    Case,
    blended,
    noise,
    states,
    tokenizer,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "prompt_to_prompt.npz")
CLIP = tokenizer()


class Settings(NamedTuple):
    """All controls of all pairs, traced."""

    p: Float[Array, " pairs"]
    inject: Float[Array, "pairs 2"]
    mapper: Float[Array, "pairs n n"]
    share: Float[Array, "pairs steps n"]
    scale: Float[Array, "pairs n"]
    words: Float[Array, "pairs 2 n"]
    threshold: Float[Array, " pairs"]


def settings_of(case: Case) -> Settings:
    align = replacement if case.swap else refinement
    mapper, aligned = align(case.first, case.second, CLIP)
    window = windows(case.second, STEPS, CLIP, case.default, case.words)
    words = np.ones((2, TOKENS), np.float32)
    if case.blend is not None:
        captions = zip((case.first, case.second), case.blend, strict=True)
        words = np.stack([word_mask(caption, named, CLIP) for caption, named in captions])
    return Settings(
        p=np.float32(case.p),
        inject=np.array(case.inject, np.float32),
        mapper=mapper,
        share=window * aligned[None],
        scale=equalizer(case.second, case.scales, CLIP),
        words=words,
        threshold=np.float32(-1 if case.blend is None else case.threshold),  # -1: all is above
    )


@pytest.fixture(scope="module")
def generate(tiny_unet):
    """`generate(settings) -> latents "pairs 2 h w c"`, jitted, of the captions of all cases."""
    text = jnp.concatenate([states(name) for name in CASES])
    null = jnp.asarray(states("null")[0])
    pairs = len(CASES)
    points = grid("euler", STEPS, STABLE_DIFFUSION)

    @jax.jit
    def generate(s: Settings):
        store = jax.new_ref(jnp.zeros((2 * pairs, MAPS, MAPS, TOKENS)))

        def hook(i):
            def edit(first, second):
                return reweight(take_over(first, second, s.mapper, s.share[:, i]), s.scale)

            within = step_within(i, STEPS, s.inject[:, 0], s.inject[:, 1])
            attend = share_self_attention(step_active(i, STEPS, s.p))
            attend = inject_self_attention(within, attend, MOST)
            return record_cross_attention(store, edit_cross_attention(edit, attend))

        def after(z, sigma):
            return local_blend(z, store[...], s.words.reshape(-1, TOKENS), s.threshold)

        scale = jnp.full(pairs, GUIDANCE)
        denoise = pair_denoise(tiny_unet, STABLE_DIFFUSION, points, text, null, scale, hook)
        start = jnp.broadcast_to(noise()[None], (2 * pairs, *noise().shape))
        keys = jax.random.split(jax.random.key(0), 2 * pairs)
        z = sample_euler(denoise, start, points, keys, after)
        return z.reshape(pairs, 2, *z.shape[1:])

    return generate


@pytest.fixture(scope="module")
def settings():
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *map(settings_of, CASES.values()))


@pytest.fixture(scope="module")
def made(generate, settings):
    return dict(zip(CASES, np.asarray(generate(settings)), strict=True))


@pytest.fixture(scope="module")
def plain(generate, settings):
    """The same captions with every control off."""
    off = [settings_of(Case(case.first, case.second)) for case in CASES.values()]
    off = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *off)
    return dict(zip(CASES, np.asarray(generate(off)), strict=True))


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_latents_are_the_golden_ones(made, plain, name):
    want = GOLDEN[f"latents/{name}"]
    assert error(made[name], want) < 1e-4
    assert error(plain[name][0], want[0]) < 1e-4  # first pictures are never changed
    assert error(plain[name][1], want[1]) > 1e-2  # control: without the case's controls


CONTROLS = {
    "swap": lambda s: s._replace(share=jnp.roll(s.share, 1, axis=1)),
    "swap_longer": lambda s: s._replace(mapper=jnp.broadcast_to(jnp.eye(TOKENS), s.mapper.shape)),
    "swap_word": lambda s: s._replace(share=jnp.broadcast_to(s.share[:, :, :1], s.share.shape)),
    "refine": lambda s: s._replace(share=jnp.ceil((s.share + s.share.max(2, keepdims=True)) / 2)),
    "reweight": lambda s: s._replace(scale=jnp.maximum(s.scale, 0)),
    "inject": lambda s: s._replace(inject=s.inject - 0.2),
    "share": lambda s: s._replace(p=s.p - 0.25),
    "blend": lambda s: s._replace(threshold=s.threshold - 0.1),
    "all": lambda s: s._replace(p=s.p + 0.25),
}
"""Small mistakes in each case: a step late, identity as alignment, no window of the word's own, new
words taken over, no negative scale, a step less, a step less, another threshold, a step more."""


def test_controls_small_mistakes_are_seen(generate, settings, made):
    assert CONTROLS.keys() == CASES.keys()
    wrong = settings
    for i, mistake in enumerate(CONTROLS.values()):
        wrong = jax.tree.map(lambda x, y, i=i: x.at[i].set(y[i]), wrong, mistake(settings))
    for name, got in zip(CASES, generate(wrong), strict=True):
        assert error(got, GOLDEN[f"latents/{name}"]) > 5e-4, name
    assert generate._cache_size() == 1  # one compilation for all values


@pytest.mark.parity
def test_local_blend_is_the_golden_one():
    z, maps, words, threshold = (jnp.asarray(x) for x in blended())
    got = local_blend(z, maps, words, threshold)
    want = GOLDEN["blend"]
    assert np.array_equal(got, want)
    assert np.array_equal(got[::2], z[::2])
    changed = (got[1::2] != z[1::2]).any(-1).mean((1, 2))
    assert ((0.02 < changed) & (changed < 0.98)).all()
    assert not np.array_equal(local_blend(z, maps, words, threshold - 0.2), want)
    assert not np.array_equal(local_blend(z, maps, words[::-1], threshold), want)
    assert np.array_equal(local_blend(z, 7 * maps, words, threshold), want)  # a sum is a mean


def test_golden_files_are_small():
    files = list((Path(__file__).parent / "golden").iterdir())
    assert sum(file.stat().st_size for file in files) < 2**20
