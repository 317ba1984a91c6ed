# SPDX-License-Identifier: Apache-2.0
"""The training state, how it begins, and the step that changes it. Plain pytrees throughout."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from ip2p_jax import config
from ip2p_jax.tpu.options import compiler_options
from ip2p_jax.training.optim import ema_rates, moved
from ip2p_jax.types import Params, TrainState

Metrics = dict[str, Float[Array, "2"]]
"""Name -> (sum, weight): a mean that can go on over several steps."""

Loss = Callable[[Params, Params, Any, Key[Array, " b"]], tuple[Float[Array, ""], Metrics]]
"""`loss(params, frozen, batch, keys)`: the scalar to minimise and what to log; a key a row. Batches
are records of arrays of one length, such as types.Batch."""


class Start(NamedTuple):
    """Where training starts: the shapes of what is trained, and `make(shardings)`, which puts the
    parameters on devices. By part: "unet", "text" or "vae"."""

    shapes: Params
    make: Callable[[Any], Params]


Step = Callable[[TrainState, Params, Any, Key[Array, ""]], tuple[TrainState, Metrics]]


def mean(value: Float[Array, ""] | Bool[Array, ""]) -> Float[Array, "2"]:
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


def row_keys(key: Key[Array, ""], rows: Int[Any, " b"]) -> Key[Array, " b"]:
    """One key of a step's for each of these rows of the global batch, whatever devices and hosts
    hold them."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    cfg: config.Optim,
    rows: Int[np.ndarray, " b"],
    devices: jax.sharding.Mesh,
) -> Step:
    """Builds an optimizer step: the mean gradient of a batch, an update, the EMA.

    `rows` are those of the global batch, as they lie on the devices (`mesh.rows_in_place`).
    `frozen` is an argument and never a closure, so it is not baked into the compiled program.

    Where the loss or the gradient is not finite, the step changes nothing but its number: it is
    `skipped`, and has no other metric.
    """
    gradient = accumulated(loss, rows, cfg.accumulate, devices)

    def step(
        state: TrainState, frozen: Params, batch: Any, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        grads, metrics = gradient(state.params, frozen, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        rates = ema_rates(state.step, cfg.accumulate, cfg.ema_decay)
        ema = moved(state.ema, state.params, params, rates)
        new = TrainState(state.step, params, ema, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

        metrics |= {"grad_norm": mean(norm), "param_norm": mean(optax.tree.norm(new.params))}
        metrics["update_norm"] = mean(optax.tree.norm(updates))
        metrics = {name: jnp.where(finite, x, 0.0) for name, x in metrics.items()}
        metrics["skipped"] = mean(~finite)
        return new._replace(step=state.step + 1), metrics

    return step


Gradient = Callable[[Params, Params, Any, Key[Array, ""]], tuple[Params, Metrics]]
"""`gradient(params, frozen, batch, key)`: the mean over the batch, and what there is to log."""


def accumulated(
    loss: Loss, rows: Int[np.ndarray, " b"], count: int, devices: jax.sharding.Mesh
) -> Gradient:
    """The gradient of a batch that is cut into `count` micro-batches, one after the other.

    Only the activations of one are in memory. Sums are float32, as the parameters are. Each device
    cuts the rows that it holds, so nothing moves between devices.
    """
    split = NamedSharding(devices, PartitionSpec(None, ("data", "fsdp")))

    def cut(x: Any) -> Any:
        layout = "(device count b) ... -> count (device b) ..."
        return rearrange(x, layout, device=devices.size, count=count)

    def whole(params: Params, frozen: Params, batch: Any, keys: Key[Array, " b"]):
        both = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = both(params, frozen, batch, keys)
        return grads, {"loss": mean(value), **metrics}

    def gradient(params: Params, frozen: Params, batch: Any, key: Key[Array, ""]):
        if count == 1:
            return whole(params, frozen, batch, row_keys(key, rows))

        def add(total: Params, micro: Any) -> tuple[Params, Metrics]:
            batch, rows = micro
            grads, metrics = whole(params, frozen, batch, row_keys(key, rows))
            return jax.tree.map(jnp.add, total, grads), metrics

        micros = jax.lax.with_sharding_constraint(jax.tree.map(cut, batch), split)
        zero = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zero, (micros, cut(rows)))
        grads = jax.tree.map(lambda x: x / count, total)
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    return gradient


def jit_step(step: Step, shardings: Any, replicated: NamedSharding, remat: str = "none") -> Step:
    """Compiles `step`; the state is donated and keeps its layout, metrics are on every device.
    `remat` is what the backward pass computes again."""
    device = next(iter(replicated.device_set))
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, replicated),
        compiler_options=compiler_options(device, remat),
    )
