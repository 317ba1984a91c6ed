# SPDX-License-Identifier: Apache-2.0
"""The training state, how it begins, and the step that changes it. Plain pytrees throughout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from ip2p_jax.training.optim import ema_decay
from ip2p_jax.types import Batch, Params, TrainState

Metrics = dict[str, Float[Array, "2"]]
"""Name -> (sum, weight): a mean that can go on over several steps."""

Loss = Callable[[Params, Params, Batch, Key[Array, " b"]], tuple[Float[Array, ""], Metrics]]
"""`loss(params, frozen, batch, keys)`: the scalar to minimise and what to log; a key a row."""

Step = Callable[[TrainState, Params, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]


def mean(value: Float[Array, ""]) -> Float[Array, "2"]:
    """Makes a metric of weight 1 of a scalar."""
    return jnp.stack([value.astype(jnp.float32), jnp.ones(())])


def begin(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the EMA starts as the parameters (a copy)."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def init_state(
    init: Callable[..., Params], args: tuple, tx: optax.GradientTransformation, shardings: Any
) -> TrainState:
    """Computes `begin(init(*args))` in place: each device makes only the shards it keeps."""
    return jax.jit(lambda *args: begin(init(*args), tx), out_shardings=shardings)(*args)


def abstract_state(
    init: Callable[..., Params], args: tuple, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the shapes and types of `init_state`; computes nothing."""
    return jax.eval_shape(lambda *args: begin(init(*args), tx), *args)


def run_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Two keys that share nothing: for the first parameters, and for the steps."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    return init_key, step_key


def row_keys(key: Key[Array, ""], step: Any, rows: int) -> Key[Array, " b"]:
    """One key for each row of the global batch, whatever devices and hosts hold the rows."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def make_step(loss: Loss, tx: optax.GradientTransformation, decay_bound: float) -> Step:
    """Builds the step of one micro-batch: gradient, optimizer, EMA.

    `frozen` is an argument and never a closure, so it is not baked into the compiled program.
    """

    def step(
        state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        keys = row_keys(key, state.step, batch.tokens.shape[0])
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, frozen, batch, keys
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step + 1, decay_bound)
        ema: Any = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = {
            "loss": mean(value),
            "grad_norm": mean(optax.tree.norm(grads)),
            "param_norm": mean(optax.tree.norm(params)),
            **metrics,
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def jit_step(step: Step, shardings: Any, replicated: NamedSharding) -> Step:
    """Compiles `step`; the state is donated and keeps its layout, metrics are on every device."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
