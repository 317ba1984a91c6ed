# SPDX-License-Identifier: Apache-2.0
"""Claims: a candidate depends on (seed, prompt, candidate) alone; first pictures are what plain
text-to-image makes; the scores are those of CLIP on the pictures that are written.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_gen.candidates import CandidateMaker, Recipe, Rows, Texts, Unit, draw
from data_gen.triplet_file import Triplet
from ip2p_jax import guided
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.placed import place
from ip2p_jax.weights.load import load

TRIPLETS = [Triplet("a cat", "make it a dog", "a dog"), Triplet("noon", "make it night", "night")]


@pytest.fixture(scope="module")
def made(maker):
    """Units 0 of two prompts: 4 candidates on two devices."""
    return jax.tree.map(np.asarray, maker([Unit(3, 0), Unit(8, 1)], TRIPLETS))


def test_draws_are_in_their_ranges_and_differ():
    recipe = Recipe(p=(0.2, 0.3), scale=(5.0, 6.0))
    prompt, candidate = jnp.repeat(jnp.arange(8), 25), jnp.tile(jnp.arange(25), 8)
    drawn = draw(recipe, prompt.astype(jnp.uint32), candidate.astype(jnp.uint32))
    for values, (low, high) in ((drawn.p, recipe.p), (drawn.scale, recipe.scale)):
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high >= values.max() > high - 0.1 * (high - low)
        assert len(set(values.tolist())) == 200
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
    assert abs(np.corrcoef(drawn.p, drawn.scale)[0, 1]) < 0.2
    keys = np.concatenate([jax.random.key_data(k) for k in (drawn.noise, drawn.steps)])
    assert len(np.unique(keys, axis=0)) == 400


def test_a_candidate_is_the_same_whatever_is_made_beside_it(maker, made):
    """Bit for bit: alone, and in the other place of the batch. Control: its neighbour differs."""
    alone = maker([Unit(8, 1)], TRIPLETS[1:])
    swapped = maker([Unit(8, 1), Unit(3, 0)], TRIPLETS[::-1])
    for again in (alone, swapped):
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:2], b[2:])
    assert np.any(made.pictures[2] != made.pictures[3])


def test_one_device_and_other_rows(maker, made, tiny_sd, tiny_clip):
    """One device makes the same bytes; at other rows a device, latents differ by 1e-5 at most.
    Control: another candidate's differ by far more."""
    one = jax.devices()[:1]
    model = place(load(str(tiny_sd)), devices=one)
    alone = CandidateMaker(
        model, Clip.from_pretrained(str(tiny_clip), devices=one), maker.recipe, 2
    )
    got = jax.tree.map(np.asarray, alone([Unit(3, 0)], TRIPLETS[:1]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(a, b[:2])

    def latents(count: int) -> np.ndarray:
        captions = [TRIPLETS[0].input, TRIPLETS[0].output]
        tokens = np.repeat(model.tokenize(captions)[None], count, axis=0)
        prompt = jnp.full(count, 3, jnp.uint32)
        rows = Rows(prompt, jnp.arange(count, dtype=jnp.uint32), Texts(tokens, tokens))
        drawn = draw(maker.recipe, rows.prompt, rows.candidate)
        return np.asarray(jax.jit(alone.latents)(model.params, rows, drawn, alone.points))

    two, four = latents(2), latents(4)
    assert np.abs(two - four[:4]).max() <= 1e-5 * np.abs(two).max()
    assert np.abs(two - four[4:]).max() > 1e-2 * np.abs(two).max()


def test_first_pictures_are_plain_text_to_image(maker, made):
    """Control: second pictures are not, for they see the first."""
    recipe, model = maker.recipe, maker.model
    prompt, candidate = jnp.array([3, 3, 8, 8], jnp.uint32), jnp.array([0, 1, 2, 3], jnp.uint32)
    drawn = draw(recipe, prompt, candidate)
    for i in (0, 1):
        texts = [text for t in TRIPLETS for text in [(t.input, t.output)[i]] * 2]
        batch = guided.TextBatch(
            tokens=model.tokenize(texts),
            negative=model.tokenize([""] * 4),
            text_guidance=np.asarray(drawn.scale),
            noise=unit_noise(drawn.noise, made_latents(maker)),
            keys=drawn.steps,
        )
        plain = jax.jit(guided.generate, static_argnums=(0, 1, 2, 3))(
            SAMPLERS[recipe.sampler],
            model.schedule,
            model.networks,
            model.config.vae.scaling_factor,
            model.params,
            jax.device_put(batch, model.replicated),
            maker.points,
        )
        difference = np.abs(np.asarray(plain.images).astype(int) - made.pictures[:, i])
        assert (difference.max() <= 1) == (i == 0)
    np.testing.assert_allclose(made.p, drawn.p)


def made_latents(maker: CandidateMaker) -> tuple[int, int, int]:
    vae = maker.model.config.vae
    return maker.recipe.height // vae.factor, maker.recipe.width // vae.factor, vae.latent_channels


def test_scores_are_clips_of_the_pictures_and_captions(maker, made):
    captions = [[(t.input, t.output)[i] for t in TRIPLETS for _ in range(2)] for i in (0, 1)]
    want = maker.clip.scores(made.pictures[:, 0], made.pictures[:, 1], *captions)
    for a, b in zip(made.scores, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    swapped = maker.clip.scores(made.pictures[:, 1], made.pictures[:, 0], *captions)
    assert np.abs(swapped.sim_dir - made.scores.sim_dir).min() > 1e-3
