# SPDX-License-Identifier: Apache-2.0
"""Claims: AdamW is torch's, with decay on every parameter; k micro-batches are averaged; the rate
warms up; the EMA is the released code's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ip2p_jax.config import Optim
from ip2p_jax.training.optim import ema_decay, make_optimizer
from ip2p_jax.training.state import begin, make_step
from ip2p_jax.types import Batch

RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4), "scale": np.ones(4)}
START = {name: x.astype(np.float32) for name, x in START.items()}
GRADS = [
    {n: RNG.normal(size=x.shape).astype(np.float32) for n, x in START.items()} for _ in range(24)
]


def ours(cfg: Optim) -> list[dict]:
    """Parameters after each micro-batch."""
    tx = make_optimizer(cfg)
    params, state, seen = START, tx.init(START), []
    update = jax.jit(tx.update)
    for grads in GRADS:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def theirs(cfg: Optim) -> list[dict]:
    """torch.optim.AdamW on the mean gradient of each `accumulate` micro-batches."""
    params = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in START.items()}
    adamw = torch.optim.AdamW(
        params.values(), cfg.lr, (cfg.b1, cfg.b2), cfg.eps, weight_decay=cfg.weight_decay
    )
    seen, k = [], cfg.accumulate
    for i in range(len(GRADS)):
        if i % k == k - 1:
            step = i // k
            adamw.param_groups[0]["lr"] = cfg.lr * (min(1, step / cfg.warmup) if cfg.warmup else 1)
            for n, p in params.items():
                p.grad = torch.tensor(np.mean([g[n] for g in GRADS[i + 1 - k : i + 1]], axis=0))
            adamw.step()
        seen.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return seen


def error(got: list[dict], want: list[dict]) -> float:
    pairs = [(np.asarray(g[n]), w[n]) for g, w in zip(got, want, strict=True) for n in w]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parity
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("warmup", [0, 3])
def test_adamw_is_torchs(accumulate, warmup):
    cfg = Optim(lr=1e-2, weight_decay=0.1, accumulate=accumulate, warmup=warmup)
    got = ours(cfg)
    assert error(got, theirs(cfg)) < 1e-5
    for change in ({"weight_decay": 0.0}, {"b2": 0.9}, {"warmup": 1 + warmup}):
        assert error(got, theirs(Optim(**vars(cfg) | change))) > 1e-4  # controls


def test_every_parameter_decays():
    """Without gradients all that is left is the decay, on biases and norms as on kernels."""
    tx = make_optimizer(Optim(lr=0.1, weight_decay=0.5, accumulate=1))
    zero = jax.tree.map(jnp.zeros_like, START)
    updates, _ = tx.update(zero, tx.init(START), START)
    for name, x in START.items():
        np.testing.assert_allclose(updates[name], -0.05 * x, rtol=1e-6)


def test_decay_of_the_ema():
    for n, want in ((1, 2 / 11), (4, 5 / 14), (40_000, 0.999775), (89_000, 0.99989888), (10**5, 1)):
        got = float(ema_decay(jnp.int32(n), 0.9999))
        assert got == pytest.approx(min(0.9999, want), abs=2e-7)


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
    """Three micro-batches make a step, and each of them decays with the same parameters."""
    cfg = Optim(lr=1e-2, accumulate=3, ema_decay=bound)
    tx = make_optimizer(cfg)

    def loss(params, frozen, batch, keys):
        return sum(
            jnp.sum(g * p) for g, p in zip(frozen.values(), params.values(), strict=True)
        ), {}

    step = jax.jit(make_step(loss, tx, cfg.ema_decay, np.arange(1)))
    state = begin({n: jnp.asarray(x) for n, x in sorted(START.items())}, tx)
    per_micro, per_step = LitEma(START, bound), LitEma(START, bound)
    nothing = np.zeros((1, 1, 1, 3), np.uint8)
    for i, (grads, params) in enumerate(zip(GRADS, theirs(cfg), strict=True)):
        grads = dict(sorted(grads.items()))
        batch = Batch(nothing, nothing, np.zeros((1, 1), np.int32))
        state, _ = step(state, grads, batch, jax.random.key(0))
        per_micro(params)
        if i % cfg.accumulate == 0:
            per_step(params)
        assert error([state.ema], [per_micro.shadow]) < 1e-5
    assert int(state.step) == len(GRADS)
    assert error([state.ema], [per_step.shadow]) > 1e-4  # control: one decay a step
