# SPDX-License-Identifier: Apache-2.0
"""Claims: the text-to-image loss is the one torch computes from the same draws, and from cached
latents the same; the samples that a run shows are the pictures that the Generator makes, by seeds
0, 1, ..."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange

from ip2p_jax.config import Objective
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.generator import Generator
from ip2p_jax.networks import networks
from ip2p_jax.training.state import row_keys
from ip2p_jax.training.tasks.generate import generate_task, posterior_of_pictures
from ip2p_jax.training.tasks.task import given
from ip2p_jax.types import CaptionedBatch, CaptionedLatentBatch
from ip2p_jax.weights.load import load
from tests.training import tiny
from tests.training.test_state import Torch, draws

ROWS, RATE = 8, 0.2
TEXTS = ["a red circle", "a blue star on the left"]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(str(tiny_sd))


def build(model, trained: tuple[str, ...], cached: bool = False):
    """The task of a model that trains these parts, and what it trains."""
    params = {part: model.params[part] for part in trained}
    frozen = {part: x for part, x in model.params.items() if part not in trained}
    null = tokenize(model.tokenizer, [""])[0]
    return params, generate_task(
        model.config,
        given(params),
        frozen,
        null,
        schedule=STABLE_DIFFUSION,
        objective=Objective(drop_rate=RATE),
        sample_steps=2,
        dtype=jnp.float32,
        cached=cached,
    )


def captioned(rows: int) -> CaptionedBatch:
    pairs = tiny.batch(rows)
    return CaptionedBatch(pairs.input, pairs.tokens)


@torch.no_grad()
def their_loss(oracle: Torch, batch: CaptionedBatch, null_tokens, drawn, change: str = ""):
    """Each row's loss on diffusers' networks; `change` names one thing to do wrongly."""

    def nchw(x):
        return rearrange(torch.tensor(x), "b h w c -> b c h w")

    posterior = oracle.posterior(batch.image)
    z0 = posterior.mean
    if change != "mean for the target":
        z0 = z0 + posterior.std * nchw(drawn["posterior"])
    z0 = z0 * (1.0 if change == "target not scaled" else 0.18215)
    text = oracle.text(torch.tensor(batch.tokens, dtype=torch.long)).last_hidden_state
    null = oracle.text(torch.tensor(null_tokens, dtype=torch.long)[None]).last_hidden_state
    rate = {"nothing dropped": 0.0, "half of it dropped": RATE}.get(change, 2 * RATE)
    for i, u in enumerate(drawn["u"]):
        text[i] = null[0] if u < rate else text[i]
    eps, t = nchw(drawn["eps"]), torch.tensor(drawn["t"], dtype=torch.long)
    predicted = oracle.unet(oracle.scheduler.add_noise(z0, eps, t), t, text).sample
    return ((predicted - eps) ** 2).mean((1, 2, 3)).numpy()


CHANGES = (
    "mean for the target",
    "target not scaled",
    "nothing dropped",
    "half of it dropped",
)


@pytest.mark.parity
def test_loss_is_diffusers(model, tiny_sd):
    """Texts go twice as often as `drop_rate` says; nothing else is in the way."""
    params, task = build(model, ("unet",))
    keys, batch = row_keys(tiny.KEY, np.arange(ROWS)), captioned(ROWS)
    got, metrics = jax.jit(task.loss)(params, task.frozen, batch, keys)
    null, drawn, oracle = tokenize(model.tokenizer, [""])[0], draws(keys), Torch(tiny_sd)
    want = their_loss(oracle, batch, null, drawn)
    assert abs(got - want.mean()) < 1e-4 * want.mean()
    counts = np.array([metrics[f"loss_t{i + 1}"][1] for i in range(4)])
    np.testing.assert_array_equal(counts, np.bincount(drawn["t"] // 250, minlength=4))
    for change in CHANGES:
        wrong = their_loss(oracle, batch, null, drawn, change)
        assert abs(got - wrong.mean()) > 1e-3 * want.mean(), change


def test_loss_from_latents_is_that_from_pictures(model):
    """Of the same pictures, with the same keys; one that takes the mean for the target misses."""
    params, task = build(model, ("unet",))
    _, from_latents = build(model, ("unet",), cached=True)
    keys, batch = row_keys(tiny.KEY, np.arange(ROWS)), captioned(ROWS)
    want = float(jax.jit(task.loss)(params, task.frozen, batch, keys)[0])
    posterior = latents_of(model, batch)
    loss = jax.jit(from_latents.loss)
    got = float(loss(params, from_latents.frozen, posterior, keys)[0])
    assert got == pytest.approx(want, rel=1e-5)
    no_noise = posterior._replace(log_var=jnp.full_like(posterior.log_var, -30.0))
    wrong = float(loss(params, from_latents.frozen, no_noise, keys)[0])
    assert abs(wrong / want - 1) > 1e-3


def latents_of(model, batch: CaptionedBatch) -> CaptionedLatentBatch:
    """What a cache of these pictures would hold, in float32."""
    nets = networks(model.config, jnp.float32)
    posterior = jax.jit(posterior_of_pictures(nets.vae))({"vae": model.params["vae"]}, batch)
    return CaptionedLatentBatch(*posterior, batch.tokens)


@pytest.mark.slow
def test_samples_are_the_generators(model):
    """With the text tower trained: then its EMA counts. From latents, what they decode to is
    beside them."""
    ema, task = build(model, ("unet", "text"))
    batch = captioned(2)._replace(tokens=tokenize(model.tokenizer, TEXTS))
    _, from_latents = build(model, ("unet", "text"), cached=True)
    both = jax.jit(from_latents.sample)(ema, from_latents.frozen, latents_of(model, batch))
    decoded, same = np.split(np.asarray(both).astype(int), 2, axis=2)
    samples = np.asarray(jax.jit(task.sample)(ema, task.frozen, batch)).astype(int)
    generator = Generator(model, rows=2)

    def pictures(seeds: list[int]) -> np.ndarray:
        made = generator(TEXTS, steps=2, seed=seeds, size=(16, 16))
        return np.stack([np.asarray(x) for x in made]).astype(int)

    assert np.abs(samples - pictures([0, 1])).max() <= 1
    assert np.abs(samples - same).max() <= 1 and np.abs(samples - decoded).max() > 5
    assert np.abs(samples - pictures([1, 0])).max() > 5  # control: other noise
