# SPDX-License-Identifier: Apache-2.0
"""What a run trains, and where that starts: what all tasks share.

Each task is a module beside this one: `edit` (InstructPix2Pix), `generate` (text-to-image), `vae`
and `clip`. Which one is decided when the task is built, never in the step.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key, UInt8

from ip2p_jax.models.layers import abstract
from ip2p_jax.training import mesh
from ip2p_jax.training.state import Loss, Start
from ip2p_jax.types import Params

Sample = Callable[[Params, Params, Any], UInt8[Array, "b h w 3"]]
"""`sample(ema, frozen, batch)`: what the model makes of a batch."""


class Task(NamedTuple):
    """What is trained, from what `start`; `frozen` goes to `loss` and `sample` as an argument."""

    config: Any  # its dimensions: ModelConfig, or CLIPConfig
    start: Start
    frozen: Params
    loss: Loss
    sample: Sample


def given(params: Params) -> Start:
    """Starts from these parameters, on the host. Only shapes will do if they are not to be made."""
    return Start(params, lambda shardings: jax.tree.map(mesh.put, params, shardings))


def scratch(key: Key[Array, ""], **parts: tuple[Callable[..., nnx.Module], Any]) -> Start:
    """Starts from random parameters of each part, given as (network, its dimensions)."""

    def init() -> Params:
        keys = jax.random.split(key, len(parts))
        return {
            name: random_params(network, cfg, part_key)
            for part_key, (name, (network, cfg)) in zip(keys, parts.items(), strict=True)
        }

    shapes = {name: abstract(*part)[1] for name, part in parts.items()}
    return Start(shapes, lambda shardings: jax.jit(init, out_shardings=shardings)())


def random_params(network: Callable[..., nnx.Module], cfg: Any, key: Key[Array, ""]) -> Params:
    """Parameters of a new network. Counting keys under a trace would cost seconds."""
    rngs, count = nnx.Rngs(key), itertools.count()

    def fresh() -> Key[Array, ""]:
        return jax.random.fold_in(key, next(count))

    rngs.params = fresh  # pyright: ignore[reportAttributeAccessIssue]
    return nnx.to_pure_dict(nnx.state(network(cfg, rngs=rngs)))
