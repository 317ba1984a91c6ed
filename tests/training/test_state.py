# SPDX-License-Identifier: Apache-2.0
"""Claims: the editor's loss is the one torch computes from the same draws; one compiled step serves
a whole run; the step changes what it should, in four micro-batches as in one; what is not finite
changes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from einops import rearrange
from transformers import CLIPTextModel

from ip2p_jax.config import Checkpoint, Config, Objective, Optim
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.training import checkpoint, mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.state import (
    abstract_state,
    begin,
    init_state,
    jit_step,
    make_step,
    mean,
    row_keys,
)
from ip2p_jax.training.tasks.edit import edit_task
from ip2p_jax.training.tasks.task import given
from ip2p_jax.weights.load import load
from tests.training.tiny import KEY, batch, grid, put, toy_loss, toy_params

ROWS, RATE = 8, 0.3


def draws(keys) -> dict[str, np.ndarray]:
    """Everything random of a batch, by the documented splits of each row's key."""
    z_keys, loss_keys = jax.vmap(lambda k: jax.random.split(k, 2), out_axes=1)(keys)
    noise, t, drop = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(loss_keys)
    shape = (4, 4, 4)
    found = {
        "posterior": unit_noise(z_keys, shape),
        "eps": unit_noise(noise, shape),
        "t": jax.vmap(lambda k: jax.random.randint(k, (), 0, 1000))(t),
        "u": jax.vmap(jax.random.uniform)(drop),
    }
    return {name: np.asarray(x) for name, x in found.items()}


class Torch:
    """The loss on diffusers' networks; `change` names one thing to do wrongly."""

    def __init__(self, folder):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.vae = AutoencoderKL.from_pretrained(folder / "vae")
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.scheduler = DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )

    def posterior(self, pictures):
        x = torch.tensor(pictures / 127.5 - 1, dtype=torch.float32)
        return self.vae.encode(rearrange(x, "b h w c -> b c h w")).latent_dist

    @torch.no_grad()
    def loss(self, batch, null_tokens, drawn, change: str = "") -> np.ndarray:
        def nchw(x):
            return rearrange(torch.tensor(x), "b h w c -> b c h w")

        target, given = self.posterior(batch.output), self.posterior(batch.input)
        z0 = target.mean + target.std * nchw(drawn["posterior"])
        z0 = z0 * (1.0 if change == "target not scaled" else 0.18215)
        image = given.mean
        if change == "condition sampled":
            image = image + given.std * nchw(drawn["posterior"])
        image = image * (0.18215 if change == "condition scaled" else 1.0)
        text = self.text(torch.tensor(batch.tokens, dtype=torch.long)).last_hidden_state
        null = self.text(torch.tensor(null_tokens, dtype=torch.long)[None]).last_hidden_state
        rate = 0.0 if change == "nothing dropped" else RATE
        for i, u in enumerate(drawn["u"]):
            text[i] = null[0] if u < 2 * rate else text[i]
            image[i] = image[i] * (0.0 if rate <= u < 3 * rate else 1.0)
        eps, t = nchw(drawn["eps"]), torch.tensor(drawn["t"], dtype=torch.long)
        noisy = self.scheduler.add_noise(z0, eps, t)
        channels = [image, noisy] if change == "image first" else [noisy, image]
        predicted = self.unet(torch.cat(channels, 1), t, text).sample
        return ((predicted - eps) ** 2).mean((1, 2, 3)).numpy()


CHANGES = (
    "condition sampled",
    "condition scaled",
    "target not scaled",
    "image first",
    "nothing dropped",
)


@pytest.mark.parity
def test_loss_is_the_papers(tiny_ip2p):
    p = load(str(tiny_ip2p))
    null = np.asarray(p.tokenizer("", padding="max_length", max_length=77).input_ids, np.int32)
    frozen = {part: p.params[part] for part in ("vae", "text")}
    task = edit_task(
        p.config,
        given({"unet": p.params["unet"]}),
        frozen,
        null,
        schedule=STABLE_DIFFUSION,
        objective=Objective(drop_rate=RATE),
        sample_steps=2,
        dtype=jnp.float32,
    )
    keys, pairs = row_keys(KEY, np.arange(ROWS)), batch(ROWS)
    params = {"unet": p.params["unet"]}
    got, metrics = jax.jit(task.loss)(params, task.frozen, pairs, keys)
    drawn, oracle = draws(keys), Torch(tiny_ip2p)
    want = oracle.loss(pairs, null, drawn)
    assert abs(got - want.mean()) < 1e-4 * want.mean()

    def quarters(rows: np.ndarray) -> np.ndarray:
        return np.bincount(drawn["t"] // 250, rows, minlength=4)

    sums, counts = np.array([metrics[f"loss_t{i + 1}"] for i in range(4)]).T
    np.testing.assert_array_equal(counts, quarters(np.ones(ROWS)))
    np.testing.assert_allclose(sums, quarters(want), rtol=1e-4)
    for change in CHANGES:
        wrong = quarters(oracle.loss(pairs, null, drawn, change))[counts > 0]
        assert np.abs(sums[counts > 0] / wrong - 1).max() > 1e-3, change


def toy(devices, optim: Optim, counter: list, rows: int = 8):
    """State, shardings, shapes and compiled step of a toy that counts its traces."""
    tx = make_optimizer(optim)

    def loss(*args):
        counter.append(1)
        return toy_loss(*args)

    start = given(toy_params())
    shapes = abstract_state(start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    step = make_step(loss, tx, optim, np.arange(rows), devices)
    step = jit_step(step, shardings, mesh.replicated(devices))
    return init_state(start, tx, shardings), shapes, shardings, step


def test_one_trace_serves_the_run_and_what_is_restored(tmp_path):
    """Steps, a checkpoint, restored, more steps: the second half is bit for bit the first run's."""
    devices, traces = grid(2, 4), []
    state, shapes, shardings, step = toy(devices, Optim(accumulate=2, warmup=3), traces, 16)
    frozen, key = put(devices, {"gain": np.float32(2)}), put(devices, KEY)

    def steps(state, first, last):
        for i in range(first, last):
            state, metrics = step(state, frozen, mesh.put_batch(devices, batch(16, seed=i)), key)
        return state

    with checkpoint.open_manager(str(tmp_path), Checkpoint()) as manager:
        state = steps(state, 0, 3)
        checkpoint.save(manager, state, {"batch": 3}, Config())
        want = jax.device_get(steps(state, 3, 6))
        restored, position = checkpoint.restore(manager, 3, shapes, shardings)
    assert position == {"batch": 3} and int(restored.step) == 3
    got = jax.device_get(steps(restored, 3, 6))
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, got, want)
    saved = json.loads((tmp_path / "checkpoints/3/config/metadata").read_text())
    assert saved["optim"] == vars(Config().optim)


def test_state_begins_and_moves():
    devices = grid(1, 1)
    state, _, _, step = toy(devices, Optim(accumulate=2), [])
    begun = jax.device_get(state)
    for x in (begun.params, begun.ema):
        jax.tree.map(np.testing.assert_array_equal, x, toy_params())
    frozen = {"gain": np.float32(1)}
    state, metrics = step(state, frozen, batch(), KEY)
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), state.params, begun.params)
    assert all(jax.tree.leaves(changed)) and int(state.step) == 1
    state, again = step(state, frozen, batch(), KEY)
    own, other = float(metrics["own"][0]), float(again["own"][0])
    assert own != other  # a key of its own for each step
    assert float(metrics["grad_norm"][0]) > 0 and metrics["loss"][1] == 2  # micro-batches
    assert int(state.step) == 2 and metrics["skipped"][0] == 0


def test_rows_have_keys_of_their_own():
    def keys(rows) -> np.ndarray:
        return np.asarray(jax.random.key_data(row_keys(KEY, np.array(rows))))

    data = keys(range(64))
    assert len(np.unique(data, axis=0)) == 64
    np.testing.assert_array_equal(keys([7, 2]), data[[7, 2]])


def ended(devices, optim: Optim, steps: int = 3):
    """The state after some steps of the toy on 32 rows, the metrics of the last, its program."""
    tx, start = make_optimizer(optim), given(toy_params())
    shardings = mesh.state_shardings(devices, abstract_state(start, tx))
    step = make_step(toy_loss, tx, optim, np.arange(32), devices)
    step = jit_step(step, shardings, mesh.replicated(devices))
    state = init_state(start, tx, shardings)
    frozen, key = put(devices, {"gain": np.float32(2)}), put(devices, KEY)
    program = step.lower(state, frozen, mesh.put_batch(devices, batch(32)), key).compile().as_text()
    for i in range(steps):
        rows = mesh.put_batch(devices, batch(32, seed=i))
        state, metrics = step(state, frozen, rows, key)
    return jax.device_get((state, metrics)), program


def test_micro_batches_add_up():
    """One, and four of each of eight devices: the same parameters, EMA but for its rates, metrics.
    The rows stay where they are: nothing of their size passes between devices."""
    devices, optim = grid(2, 4), Optim(lr=1e-2, eps=1e-2, accumulate=1, ema_decay=0.0)
    (one, metrics), _ = ended(devices, optim)
    (four, summed), program = ended(devices, dataclasses.replace(optim, accumulate=4))
    for a, b in ((one.params, four.params), (one.opt_state, four.opt_state), (one.ema, four.ema)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    for name, (value, weight) in metrics.items():
        assert summed[name][0] / summed[name][1] == pytest.approx(value / weight, rel=1e-5)
    moves = ("all-to-all", "collective-permute", "all-gather")
    assert not [x for x in program.splitlines() if "u8[" in x and any(m in x for m in moves)]
    (other, _), _ = ended(devices, dataclasses.replace(optim, lr=2e-2))
    assert np.abs(other.params["w"] - one.params["w"]).max() > 1e-3  # control


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_not_finite_is_skipped(accumulate):
    """A NaN in one of 8 rows, in one step: state and metrics are those of the other rows' steps,
    only the number of the step goes on. An infinite loss, likewise."""
    devices = grid(1, 1)

    def loss(params, frozen, rows, keys):
        return jnp.mean((rows["x"] @ params["w"]) ** 2), {"x": mean(jnp.mean(rows["x"]))}

    optim = Optim(lr=1e-2, accumulate=accumulate)
    tx = make_optimizer(optim)
    step = jax.jit(make_step(loss, tx, optim, np.arange(8), devices))
    x = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    first, metrics = step(begin({"w": jnp.ones((128, 4))}, tx), {}, {"x": x}, KEY)
    assert metrics["skipped"][0] == 0 and np.isfinite(metrics["loss"][0])
    for bad in (np.nan, np.inf, 1e30):
        spoilt = x.copy()
        spoilt[5, 3] = bad
        state, metrics = step(first, {}, {"x": spoilt}, KEY)
        assert equal(state._replace(step=first.step), first) and int(state.step) == 2
        assert metrics.pop("skipped")[0] == 1
        assert equal(metrics, jax.tree.map(jnp.zeros_like, metrics))
        after, metrics = step(state, {}, {"x": x}, KEY)
        assert metrics["skipped"][0] == 0 and int(after.step) == 3
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        assert not equal(after.params, first.params)  # control: a step that is finite moves
