# SPDX-License-Identifier: Apache-2.0
"""The compiler's options by chip, for training and for `ip2p_jax.compile` alike.

An option is here only with a measured or cited reason. Those of MaxDiffusion and MaxText that were
tried (async collective fusion, latency hiding, scoped VMEM, data-parallel all-reduce) are accepted
by libtpu 0.0.42 on all four chips; none has been measured on a whole training step, so none is set.
"""

from typing import Any

BY_KIND: dict[str, dict[str, Any]] = {}
"""Options by jax's name of a chip."""

APART = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Keeps XLA's CPU compiler from merging what is computed again with what was computed first."""


def compiler_options(device: Any, remat: str = "none") -> dict[str, Any] | None:
    """Options for programs that run on devices such as this one; None: the compiler's own.

    `remat` is what the backward pass computes again.
    """
    if device.platform == "cpu":
        return APART if remat != "none" else None
    return BY_KIND.get(device.device_kind)
