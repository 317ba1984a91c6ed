# SPDX-License-Identifier: Apache-2.0
"""AdamW as the paper's code configures it, other optimizers, and the moving average (EMA)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ip2p_jax import config
from ip2p_jax.types import Params


def make_optimizer(cfg: config.Optim) -> optax.GradientTransformation:
    """The optimizer of every parameter.

    Every weight decays, biases and norms too, by the rate times `weight_decay`; nothing is clipped
    unless `cfg` says so (appendix A.2, and the released code).
    """
    of_name = {"adamw": adam, "adafactor": adafactor}
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    decay = optax.add_decayed_weights(cfg.weight_decay)
    rate = optax.scale_by_learning_rate(learning_rate(cfg))
    return optax.chain(*clip, of_name[cfg.name](cfg), decay, rate)


def adam(cfg: config.Optim) -> optax.GradientTransformation:
    """AdamW's direction (Loshchilov and Hutter 2019); its state is twice the parameters."""
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def adafactor(cfg: config.Optim) -> optax.GradientTransformation:
    """Adafactor's direction (Shazeer and Stern 2018, algorithms 4 and 5), without momentum.

    Of arrays with two axes of at least 128 the second moments are a row and a column, so the state
    is a hundredth of the parameters. The rate is a share of each array's root mean square.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def learning_rate(cfg: config.Optim) -> optax.Schedule:
    """The rate at each update: `lr` after a linear warm-up, or falling to 0 by half a cosine."""
    if cfg.cosine_steps:
        return optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.warmup, cfg.cosine_steps)
    if cfg.warmup:
        return optax.linear_schedule(0.0, cfg.lr, cfg.warmup)
    return optax.constant_schedule(cfg.lr)


class Rates(NamedTuple):
    """How far the EMA moves within a step: to the parameters before it, then to those after it."""

    before: Float[Array, ""]
    after: Float[Array, ""]


def ema_rates(step: Int[Array, ""], count: int, bound: float) -> Rates:
    """The released code's moving average, over the `count` micro-batches of step `step` (from 0).

    It moves at every micro-batch, also at those that only gather gradients: at the n-th (from 1) of
    the run by 1 - min(bound, (1 + n) / (10 + n)). All but the last of a step still find the
    parameters that the step began with.
    """
    n = (count * step + jnp.arange(1, count + 1)).astype(jnp.float32)
    rates = jnp.maximum(1 - bound, 9 / (10 + n))
    return Rates(-jnp.expm1(jnp.sum(jnp.log1p(-rates[:-1]))), rates[-1])


def moved(ema: Params, before: Params, after: Params, rates: Rates) -> Any:
    """The EMA after a step that has changed the parameters from `before` to `after`."""

    def move(ema, before, after):
        ema = ema + rates.before * (before - ema)
        return ema + rates.after * (after - ema)

    return jax.tree.map(move, ema, before, after)
