# SPDX-License-Identifier: Apache-2.0
"""AdamW as the paper's code configures it, gradient accumulation, and the EMA's decay."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ip2p_jax import config


def make_optimizer(cfg: config.Optim) -> optax.GradientTransformation:
    """AdamW on every parameter; `accumulate` micro-batches are averaged for one of its steps.

    Every weight decays, biases and norms too; no clipping (appendix A.2, and the released code).
    """
    lr = optax.linear_schedule(0.0, cfg.lr, cfg.warmup) if cfg.warmup else cfg.lr
    adamw = optax.adamw(lr, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.accumulate == 1:
        return adamw
    return optax.MultiSteps(adamw, cfg.accumulate).gradient_transformation()


def ema_decay(n: Int[Array, ""], bound: float) -> Float[Array, ""]:
    """Returns the decay at micro-batch `n` (from 1): min(bound, (1 + n) / (10 + n)).

    Every micro-batch decays, also those that only gather gradients, as in the released code.
    """
    n = n.astype(jnp.float32)
    return jnp.minimum(bound, (1 + n) / (10 + n))
