# SPDX-License-Identifier: Apache-2.0
"""Claims: shared self-attention is what the authors' code computes, in the steps p says.

In whole generations it is compared with copied scores in `test_prompt_to_prompt_golden.py`.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from data_gen.attention_maps import attention_map
from data_gen.prompt_to_prompt import (
    edit_cross_attention,
    inject_self_attention,
    pair_denoise,
    reweight,
    share_self_attention,
    share_until,
    step_active,
    step_within,
    take_over,
)
from ip2p_jax.diffusion.denoise import denoiser, guide_text, one_batch
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.samplers import sample_euler_ancestral
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.models.attention import Place, attend
from ip2p_jax.types import Conditioning

STEPS = 5
P = jnp.array([0.0, 0.5, 1.0])
SCALE = jnp.array([3.0, 3.0, 3.0])
SELF, CROSS = Place("block", False, 4, 4), Place("block", True, 4, 4)


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def random_qkv(pairs: int, positions: int = 16, tokens: int = 16):
    rng = np.random.default_rng(1)
    shapes = [(4 * pairs, n, 2, 8) for n in (positions, tokens, tokens)]
    return tuple(jnp.asarray(2 * rng.normal(size=s), jnp.float32) for s in shapes)


def attend_by_copied_scores(active, branches=(0, 1)):
    """The authors' code: scores are written out, and copied before the softmax, row by row."""

    def hooked(place, q, k, v):
        score = jnp.einsum("bnkd,bmkd->bknm", q, k) / jnp.sqrt(q.shape[-1])
        if not place.cross:
            for pair in np.flatnonzero(active):
                for branch in branches:
                    score = score.at[pair * 4 + 2 + branch].set(score[pair * 4 + branch])
        return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(score, axis=-1), v)

    return hooked


@pytest.mark.parametrize("place", [SELF, CROSS])
def test_sharing_equals_copied_scores(place):
    active, qkv = np.array([True, False, True]), random_qkv(3)
    got = share_self_attention(jnp.asarray(active))(place, *qkv)
    assert error(got, attend_by_copied_scores(active)(place, *qkv)) < 1e-5
    wrong = attend_by_copied_scores(~active)(place, *qkv)  # control
    assert (error(got, wrong) > 1e-2) != place.cross
    first = rearrange(got, "(p i g) n k d -> i p g n k d", i=2, g=2)[0]
    want = rearrange(attend(place, *qkv), "(p i g) n k d -> i p g n k d", i=2, g=2)[0]
    assert np.array_equal(first, want)


def test_injection_is_conditional_and_only_where_small():
    active, qkv = np.array([True, False, True]), random_qkv(3)
    got = inject_self_attention(jnp.asarray(active))(SELF, *qkv)
    assert error(got, attend_by_copied_scores(active, (1,))(SELF, *qkv)) < 1e-5
    assert error(got, attend_by_copied_scores(active)(SELF, *qkv)) > 1e-2  # control
    plain = attend(SELF, *qkv)
    for place, most, same in (
        (Place("block", False, 16, 16), 256, False),
        (Place("block", False, 16, 17), 256, True),
        (Place("block", False, 16, 17), 272, False),
        (Place("block", True, 16, 16), 256, True),
    ):
        got = inject_self_attention(jnp.asarray(active), most=most)(place, *qkv)
        assert np.array_equal(got, plain) == same, place


def test_edits_change_second_conditional_rows_only():
    qkv = random_qkv(2, tokens=5)
    plain = attend(CROSS, *qkv)
    scale = jnp.array([[1.0, 1, 3, 1, 1], [1.0, 1, 1, 1, -2]])
    hook = edit_cross_attention(lambda first, second: reweight(second, scale))
    got = hook(CROSS, *qkv)
    maps = attention_map(*qkv[:2])[3::4] * scale[:, None, None, :]
    assert error(got[3::4], jnp.einsum("bknm,bmkd->bnkd", maps, qkv[2][3::4])) < 1e-5
    rest = np.array([0, 1, 2, 4, 5, 6])
    assert np.array_equal(got[rest], plain[rest])
    assert error(got[3::4], plain[3::4]) > 1e-2  # control
    assert np.array_equal(hook(SELF, *qkv), plain)


def test_taking_over_nothing_or_all():
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.random((1, 2, 6, 4)), jnp.float32) for _ in range(2))
    mapper = jnp.asarray(np.eye(4)[[1, 0, 2, 3]], jnp.float32)[None]
    assert np.array_equal(take_over(first, second, mapper, jnp.zeros((1, 4))), second)
    swapped = take_over(first, second, mapper, jnp.ones((1, 4)))
    assert np.array_equal(swapped, first[..., np.array([1, 0, 2, 3])])
    some = take_over(first, second, mapper, jnp.array([[1.0, 0, 0, 0]]))
    assert np.array_equal(some[..., 0], first[..., 1])
    assert np.array_equal(some[..., 1:], second[..., 1:])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11, 50, 100])
def test_steps_in_which_attention_is_shared(n):
    """Exactly i / (n - 1) < p, quotients of integers among them; n = 1: whenever p > 0."""
    ps = [
        Fraction(0),
        Fraction(1, 10),
        Fraction(3, 10),
        Fraction(1, 2),
        Fraction(9, 10),
        Fraction(1),
    ]
    ps += [Fraction(i, n - 1) for i in range(n - 1)]
    p = jnp.array([float(x) for x in ps])
    active = np.stack([step_active(jnp.int32(i), n, p) for i in range(n)])
    want = [[x > 0 if n == 1 else Fraction(i, n - 1) < x for x in ps] for i in range(n)]
    assert np.array_equal(active, want)
    assert n == 1 or not active[-1].any()


def test_windows_are_half_open():
    start, end = jnp.array([0.0, 0.2, 0.5]), jnp.array([0.5, 1.0, 0.5])
    within = np.stack([step_within(jnp.int32(i), 10, start, end) for i in range(10)])
    assert [np.flatnonzero(x).tolist() for x in within.T] == [[*range(5)], [*range(2, 10)], []]


@pytest.fixture(scope="module")
def inputs():
    """Text states "6 77 64" of three equal pairs of captions, of no caption, and noise."""
    text = np.random.default_rng(0).normal(size=(2, 77, 64)).astype(np.float32)
    null = jax.random.normal(jax.random.key(5), (77, 64))
    noise = jax.random.normal(jax.random.key(6), (1, 16, 16, 4))
    keys = jax.random.split(jax.random.key(7), 1)
    return jnp.tile(text, (3, 1, 1)), null, jnp.repeat(noise, 6, 0), jnp.repeat(keys, 6, 0)


@pytest.fixture(scope="module")
def shared(tiny_unet, inputs):
    """Latents "pair picture h w c" for P; the largest difference of both pictures' self-attention
    maps anywhere "step pair"; how often the program was compiled for three values of p."""
    text, null, noise, keys = inputs
    points = grid("euler_ancestral", STEPS, STABLE_DIFFUSION)

    @jax.jit
    def generate(p):
        store = jax.new_ref(jnp.zeros((STEPS, 3)))

        def hook(i):
            def watched(place, q, k, v):
                if not place.cross:
                    maps = rearrange(
                        attention_map(q, k), "(p i r) k n m -> i p (r k n m)", i=2, p=3
                    )
                    store[i] = jnp.maximum(store[i], jnp.max(jnp.abs(maps[0] - maps[1]), axis=-1))
                return attend(place, q, k, v)

            return share_self_attention(step_active(i, STEPS, p), watched)

        denoise = pair_denoise(tiny_unet, STABLE_DIFFUSION, points, text, null, SCALE, hook)
        z = sample_euler_ancestral(denoise, noise, points, keys)
        return rearrange(z, "(p i) h w c -> p i h w c", i=2), store[...]

    for p in (P[::-1], P + 0.1, P):
        z, differences = generate(p)
    return np.asarray(z), np.asarray(differences), generate._cache_size()


@pytest.fixture(scope="module")
def plain(tiny_unet, inputs):
    """Latents "picture h w c" of both captions under guidance, without any hook."""
    text, null, noise, keys = (x if i == 1 else x[:2] for i, x in enumerate(inputs))
    points = grid("euler_ancestral", STEPS, STABLE_DIFFUSION)
    cond = Conditioning(text, jnp.zeros((2, 16, 16, 0)))

    @jax.jit
    def generate():
        network = one_batch(lambda z, t, text: tiny_unet(z, t, text))
        nulls = jnp.broadcast_to(null[None], text.shape)
        guided = guide_text(denoiser(network, STABLE_DIFFUSION), cond, nulls, SCALE[:2])
        return sample_euler_ancestral(guided, noise, points, keys)

    return np.asarray(generate())


def test_first_picture_is_that_of_plain_guidance(shared, plain):
    z, _, _ = shared
    for pair in range(3):
        assert error(z[pair, 0], plain[0]) < 1e-5
    assert error(plain[1], plain[0]) > 1e-2  # control: the captions matter


def test_p_0_is_two_plain_generations_of_the_same_noise(shared, plain):
    z, _, _ = shared
    assert error(z[0, 1], plain[1]) < 1e-5
    assert error(z[1, 1], plain[1]) > 1e-3  # control


def test_second_pictures_differ_by_p(shared):
    z, _, _ = shared
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert error(z[a, 1], z[b, 1]) > 1e-3
    for pair in range(3):
        assert error(z[pair, 1], z[pair, 0]) > 1e-2  # v, and cross-attention, stay its own


def test_maps_are_equal_in_the_shared_steps_and_in_no_other(shared):
    _, differences, _ = shared
    want = [[i / (STEPS - 1) < p for p in (0.0, 0.5, 1.0)] for i in range(STEPS)]
    assert np.array_equal(differences == 0, want)
    assert differences[differences > 0].min() > 1e-4


def test_one_compilation_for_all_thresholds(shared):
    assert shared[2] == 1


def test_share_until_is_that_hook():
    qkv = random_qkv(3)
    for i in range(STEPS):
        want = share_self_attention(step_active(jnp.int32(i), STEPS, P))(SELF, *qkv)
        assert np.array_equal(share_until(P, STEPS)(jnp.int32(i))(SELF, *qkv), want)
