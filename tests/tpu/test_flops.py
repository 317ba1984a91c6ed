# SPDX-License-Identifier: Apache-2.0
"""Claims: products and convolutions count as XLA counts them, with paddings, strides and gradients;
loops are multiplied out."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ip2p_jax.tpu.flops import Axis, meetings, model_flops

X, KERNEL = (2, 8, 6, 3), (3, 3, 3, 5)


def convolve(x, kernel, stride: int = 1, padding: Any = "SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=numbers
    )


def shape(*sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, jnp.float32)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, ((7, 11), (11, 13))),
        (lambda a, b: jnp.einsum("bnkd,bmkd->bknm", a, b), ((2, 5, 3, 4), (2, 6, 3, 4))),
        (convolve, (X, KERNEL)),
        (lambda x, k: convolve(x, k, 2, ((0, 1), (1, 1))), (X, KERNEL)),
        (jax.grad(lambda x, k: jnp.sum(convolve(x, k, 2)), argnums=(0, 1)), (X, KERNEL)),
    ],
    ids=["product", "batched", "padded", "strided", "gradient"],
)
def test_flops_are_those_that_xla_counts(function, shapes):
    args = [shape(*sides) for sides in shapes]
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    counted = model_flops(function, *args)
    assert 0 < counted <= cost["flops"] < 1.1 * counted  # XLA's own has the few additions, too


def test_loops_are_multiplied_out():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    assert model_flops(loop, shape(8, 8)) == 5 * 2 * 8**3
    assert model_flops(jax.checkpoint(jax.jit(loop)), shape(8, 8)) == 5 * 2 * 8**3
    with pytest.raises(ValueError, match="loop without a known number"):
        model_flops(
            lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x), shape(8, 8)
        )


def test_positions_that_meet_an_input():
    """3 of 3 in the middle, 2 at each end; of an input with holes every other one."""
    assert meetings(Axis(size=8, window=3, output=8, low=1)) == 22
    assert meetings(Axis(size=4, window=3, output=9, low=2, dilation=2)) == 12
