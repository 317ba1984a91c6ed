# SPDX-License-Identifier: Apache-2.0
"""Claims: the editor's loss is the one torch computes from the same draws; one compiled step serves
a whole run; the step changes what it should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from einops import rearrange
from transformers import CLIPTextModel

from ip2p_jax.config import Checkpoint, Config, Optim
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.training import checkpoint, mesh
from ip2p_jax.training.optim import make_optimizer
from ip2p_jax.training.state import abstract_state, init_state, jit_step, make_step, row_keys
from ip2p_jax.training.tasks import edit_task, given
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
        drop_rate=RATE,
        sample_steps=2,
        dtype=jnp.float32,
    )
    keys, pairs = row_keys(KEY, 3, np.arange(ROWS)), batch(ROWS)
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


def toy(devices, optim: Optim, counter: list):
    """State, shardings, shapes and compiled step of a toy that counts its traces."""
    tx = make_optimizer(optim)

    def loss(*args):
        counter.append(1)
        return toy_loss(*args)

    start = given(toy_params())
    shapes = abstract_state(start, tx)
    shardings = mesh.state_shardings(devices, shapes)
    step = make_step(loss, tx, optim.ema_decay, np.arange(8))
    step = jit_step(step, shardings, mesh.replicated(devices))
    return init_state(start, tx, shardings), shapes, shardings, step


def test_one_trace_serves_the_run_and_what_is_restored(tmp_path):
    """Steps, a checkpoint, restored, more steps: the second half is bit for bit the first run's."""
    devices, traces = grid(2, 4), []
    state, shapes, shardings, step = toy(devices, Optim(accumulate=2, warmup=3), traces)
    frozen, key = put(devices, {"gain": np.float32(2)}), put(devices, KEY)

    def steps(state, first, last):
        for i in range(first, last):
            state, metrics = step(state, frozen, mesh.put_batch(devices, batch(seed=i)), key)
        return state

    with checkpoint.open_manager(str(tmp_path), Checkpoint()) as manager:
        state = steps(state, 0, 3)
        checkpoint.save(manager, state, {"batch": 3}, Config())
        want = jax.device_get(steps(state, 3, 6))
        restored, position = checkpoint.restore(manager, shapes, shardings)
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
    jax.tree.map(np.testing.assert_array_equal, state.params, begun.params)  # gathering
    first = jax.device_get(state)
    state, again = step(state, frozen, batch(), KEY)
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), state.params, first.params)
    assert all(jax.tree.leaves(changed)) and int(state.step) == 2
    own, other = float(metrics["own"][0]), float(again["own"][0])
    assert own != other  # a key of its own for each step
    assert float(metrics["grad_norm"][0]) > 0 and metrics["loss"][1] == 1


def test_rows_have_keys_of_their_own():
    def keys(step: int, rows) -> np.ndarray:
        return np.asarray(jax.random.key_data(row_keys(KEY, step, np.array(rows))))

    data = keys(5, range(64))
    assert len(np.unique(data, axis=0)) == 64
    np.testing.assert_array_equal(keys(5, [7, 2]), data[[7, 2]])
    assert not np.array_equal(keys(6, range(64)), data)
