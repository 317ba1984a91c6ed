# SPDX-License-Identifier: Apache-2.0
"""The training state, how it begins, and the step that changes it. Plain pytrees throughout."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, Key

from ip2p_jax.training.optim import ema_decay
from ip2p_jax.types import Batch, Params, TrainState

Metrics = dict[str, Float[Array, "2"]]
"""Name -> (sum, weight): a mean that can go on over several steps."""

Loss = Callable[[Params, Params, Batch, Key[Array, " b"]], tuple[Float[Array, ""], Metrics]]
"""`loss(params, frozen, batch, keys)`: the scalar to minimise and what to log; a key a row."""


class Start(NamedTuple):
    """Where training starts: the shapes of what is trained, and `make(shardings)`, which puts the
    parameters on devices. By part: "unet", "text" or "vae"."""

    shapes: Params
    make: Callable[[Any], Params]


Step = Callable[[TrainState, Params, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]


def mean(value: Float[Array, ""]) -> Float[Array, "2"]:
    """Makes a metric of weight 1 of a scalar."""
    return jnp.stack([value.astype(jnp.float32), jnp.ones(())])


def begin(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the EMA starts as the parameters (a copy)."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def init_state(start: Start, tx: optax.GradientTransformation, shardings: Any) -> TrainState:
    """Computes `begin` in place: no device ever holds more than the shards that it keeps."""
    compute = jax.jit(lambda params: begin(params, tx), donate_argnums=0, out_shardings=shardings)
    return compute(start.make(shardings.params))


def abstract_state(start: Start, tx: optax.GradientTransformation) -> TrainState:
    """Returns the shapes and types of `init_state`; computes nothing."""
    return jax.eval_shape(lambda params: begin(params, tx), start.shapes)


def run_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Two keys that share nothing: for the first parameters, and for the steps."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    return init_key, step_key


def row_keys(key: Key[Array, ""], step: Any, rows: Int[Any, " b"]) -> Key[Array, " b"]:
    """One key for each of these rows of the global batch, whatever devices and hosts hold them."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    decay_bound: float,
    rows: Int[np.ndarray, " b"],
) -> Step:
    """Builds the step of one micro-batch: gradient, optimizer, EMA.

    `rows` are those of the global batch, as they lie on the devices (`mesh.rows_in_place`).
    `frozen` is an argument and never a closure, so it is not baked into the compiled program.
    """

    def step(
        state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        keys = row_keys(key, state.step, rows)
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
