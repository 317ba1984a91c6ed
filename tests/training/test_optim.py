# SPDX-License-Identifier: Apache-2.0
"""Claims: AdamW and Adafactor are torch's, with decay on every parameter; k micro-batches are
averaged; the rate warms up and falls as it should; clipping is torch's; the EMA is the released
code's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ip2p_jax.config import Optim
from ip2p_jax.training import mesh
from ip2p_jax.training.optim import ema_rates, learning_rate, make_optimizer
from ip2p_jax.training.state import begin, make_step
from ip2p_jax.types import TrainState
from tests.training.tiny import KEY, grid

RNG = np.random.default_rng(0)
SHAPES = {"kernel": (128, 160), "bias": (160,), "scale": (4,)}
START = {n: RNG.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
GRADS = [
    {n: RNG.normal(size=x.shape).astype(np.float32) for n, x in START.items()} for _ in range(24)
]


def linear(params, frozen, batch, keys):
    """The gradient is the mean row of the batch."""
    return sum(jnp.sum(jnp.mean(batch[n], axis=0) * params[n]) for n in params), {}


def ours(cfg: Optim) -> list[TrainState]:
    """The state after each step."""
    tx, k, seen = make_optimizer(cfg), cfg.accumulate, []
    step = jax.jit(make_step(linear, tx, cfg, np.arange(k), grid(1, 1)))
    state = begin({n: jnp.asarray(x) for n, x in START.items()}, tx)
    for i in range(0, len(GRADS), k):
        batch = {n: np.stack([grads[n] for grads in GRADS[i : i + k]]) for n in START}
        state, _ = step(state, {}, batch, KEY)
        seen.append(state)
    return seen


def rate(cfg: Optim, step: int) -> float:
    """The factor of the learning rate at a step (from 0)."""
    if step < cfg.warmup:
        return step / cfg.warmup
    if not cfg.cosine_steps:
        return 1.0
    share = min(1.0, (step - cfg.warmup) / (cfg.cosine_steps - cfg.warmup))
    return (1 + np.cos(np.pi * share)) / 2


def theirs(cfg: Optim) -> list[dict]:
    """torch's optimizer on the mean gradient of each `accumulate` micro-batches; parameters after
    each micro-batch."""
    params = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in START.items()}
    common = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    optimizer = (
        torch.optim.AdamW(params.values(), betas=(cfg.b1, cfg.b2), eps=cfg.eps, **common)
        if cfg.name == "adamw"
        else torch.optim.Adafactor(params.values(), eps=(1e-15, 1e-3), **common)
    )
    seen, k = [], cfg.accumulate
    for i in range(len(GRADS)):
        if i % k == k - 1:
            optimizer.param_groups[0]["lr"] = cfg.lr * rate(cfg, i // k)
            for n, p in params.items():
                p.grad = torch.tensor(np.mean([g[n] for g in GRADS[i + 1 - k : i + 1]], axis=0))
            if cfg.clip:
                torch.nn.utils.clip_grad_norm_(params.values(), cfg.clip)
            optimizer.step()
        seen.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return seen


def error(got: list[dict], want: list[dict]) -> float:
    pairs = [(np.asarray(g[n]), w[n]) for g, w in zip(got, want, strict=True) for n in w]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


CASES = {
    "the paper's": ({}, [{"weight_decay": 0.0}, {"b2": 0.9}, {"warmup": 1}]),
    "four micro-batches": ({"accumulate": 4}, [{"b2": 0.9}]),
    "warm-up and cosine": (
        {"warmup": 3, "cosine_steps": 20},
        [{"warmup": 4}, {"cosine_steps": 24}],
    ),
    "clipped": ({"clip": 20.0, "accumulate": 2, "eps": 1e-1}, [{"clip": 0.0}, {"clip": 10.0}]),
    "adafactor": ({"name": "adafactor", "weight_decay": 0.0}, [{"name": "adamw"}, {"lr": 2e-2}]),
}


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_optimizers_are_torchs(case):
    change, controls = CASES[case]
    cfg = dataclasses.replace(Optim(lr=1e-2, weight_decay=0.1, accumulate=1), **change)
    got, k = [state.params for state in ours(cfg)], cfg.accumulate
    assert error(got, theirs(cfg)[k - 1 :: k]) < 1e-5
    for control in controls:
        assert error(got, theirs(dataclasses.replace(cfg, **control))[k - 1 :: k]) > 1e-4


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_parameter_decays(name):
    """Without gradients all that is left is the decay, on biases and norms as on kernels."""
    tx = make_optimizer(Optim(name=name, lr=0.1, weight_decay=0.5))
    zero = jax.tree.map(jnp.zeros_like, START)
    updates, _ = tx.update(zero, tx.init(START), START)
    for name, x in START.items():
        np.testing.assert_allclose(updates[name], -0.05 * x, rtol=1e-6)


def test_rates_of_a_run():
    """Closed forms: a ramp, then half a cosine to 0, then 0."""
    cfg = Optim(lr=2.0, warmup=4, cosine_steps=12)
    got = [float(learning_rate(cfg)(i)) for i in (0, 1, 4, 6, 8, 12, 20)]
    assert got == pytest.approx([0, 0.5, 2, 1 + 0.5**0.5, 1, 0, 0], abs=1e-6)
    assert float(learning_rate(Optim(lr=2.0))(10**6)) == 2.0


@pytest.mark.parametrize(("name", "share"), [("adamw", 2.0), ("adafactor", 0.02)])
def test_what_an_optimizer_keeps(name, share):
    """In shares of the parameters; what is large of it is split as they are."""
    shapes = jax.eval_shape(make_optimizer(Optim(name=name)).init, START)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert size == pytest.approx(share * sum(x.size for x in START.values()), rel=0.25)
    shardings = jax.tree.leaves(mesh.state_shardings(grid(2, 4), shapes))
    large = [s for s, x in zip(shardings, jax.tree.leaves(shapes), strict=True) if x.ndim == 2]
    assert len(large) == {"adamw": 2, "adafactor": 0}[name]
    assert all("fsdp" in sharding.spec for sharding in large)


def test_rates_of_the_ema():
    """Of the paper's run, as method and arithmetic say: 1 - 0.999775 at the end."""
    for step, count, bound, before, after in (
        (0, 1, 0.9999, 0.0, 9 / 11),
        (9_999, 4, 0.9999, 1 - (1 - 9 / 40_009) ** 3, 9 / 40_010),
        (10**6, 2, 0.9999, 1e-4, 1e-4),
    ):
        rates = ema_rates(jnp.int32(step), count, bound)
        assert float(rates.before) == pytest.approx(before, rel=1e-4, abs=1e-12)
        assert float(rates.after) == pytest.approx(after, rel=1e-6)


class LitEma:
    """The released code's moving average, in float64: called after every micro-batch."""

    def __init__(self, params: dict, decay: float):
        self.shadow = {n: x.astype(np.float64) for n, x in params.items()}
        self.decay, self.updates = decay, 0

    def __call__(self, params: dict) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for n, x in params.items():
            self.shadow[n] -= (1 - decay) * (self.shadow[n] - x)


@pytest.mark.parity
@pytest.mark.parametrize("bound", [0.5, 0.9999])
def test_ema_is_the_released_codes(bound):
    """Three micro-batches make a step: two find the parameters before it, the last those after."""
    cfg = Optim(lr=1e-2, accumulate=3, ema_decay=bound)
    states, params = ours(cfg), theirs(cfg)
    per_micro, per_step, only_new = (LitEma(START, bound) for _ in range(3))
    for i, state in enumerate(states):
        for micro in params[3 * i : 3 * i + 3]:
            per_micro(micro)
            only_new(params[3 * i + 2])
        per_step(params[3 * i + 2])
        assert error([state.ema], [per_micro.shadow]) < 1e-5
        assert int(state.step) == i + 1
    for control in (per_step, only_new):
        assert error([states[-1].ema], [control.shadow]) > 1e-4
