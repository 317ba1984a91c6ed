# SPDX-License-Identifier: Apache-2.0
"""How much of what the chips could compute a run computes (model FLOP utilisation).

Model FLOPs are those of loss and gradient as they are written: what is computed again to save
memory does not count (Chowdhery et al. 2022, appendix B).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ip2p_jax import config
from ip2p_jax.tpu.topologies import CHIPS
from ip2p_jax.training.state import Loss, row_keys
from ip2p_jax.types import Params

PEAK = {
    **{kind: chip.peak for chip in CHIPS.values() for kind in chip.kinds},
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense products of bfloat16 a second, by jax's name of a chip, as the makers state them."""


def peak(devices: list[Any]) -> float | None:
    """FLOPs a second of all these devices; None where the chip is not known."""
    rates = [PEAK.get(device.device_kind) for device in devices]
    return None if None in rates else sum(rate for rate in rates if rate)


def share(
    cfg: config.Config,
    loss: Loss,
    params: Params,
    frozen: Params,
    devices: jax.sharding.Mesh,
    batch: Any,
) -> float | None:
    """The part of the devices' FLOPs a second that one example takes; None on unknown chips.

    `params` are shapes, `batch` is one of a step.
    """
    most = peak(list(devices.devices.flat))
    if most is None:
        return None
    rows = cfg.data.batch_size // cfg.optim.accumulate
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    return model_flops(loss, params, frozen, micro, np.arange(rows)) / rows / most


def model_flops(loss: Loss, params: Any, frozen: Any, batch: Any, rows: Int[Any, " b"]) -> float:
    """FLOPs of loss and gradient over a batch, given as arrays or their shapes; nothing is run.

    Counted by XLA in the program as it was traced, before anything is fused.
    """

    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        keys = row_keys(jax.random.key(0), jnp.asarray(rows))
        return jax.grad(loss, has_aux=True)(params, frozen, batch, keys)

    cost: Any = jax.jit(gradient).lower(params, frozen, batch).cost_analysis()
    return float(cost["flops"])
