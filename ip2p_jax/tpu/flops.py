# SPDX-License-Identifier: Apache-2.0
"""FLOPs of products and convolutions, as they are written, loops multiplied out.

What meets padding or the holes of a dilation does not count, as in XLA's own count. Everything else
(norms, activations) is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr


class Axis(NamedTuple):
    """A convolution along one axis."""

    size: int  # of the input
    window: int
    output: int
    stride: int = 1
    low: int = 0  # padding before the input
    dilation: int = 1  # of the input
    spread: int = 1  # dilation of the window


def meetings(axis: Axis) -> int:
    """How many pairs of an output and a window position meet an input that is there."""
    at = np.arange(axis.output)[:, None] * axis.stride
    at = at + np.arange(axis.window)[None] * axis.spread - axis.low
    inside = (at >= 0) & (at < (axis.size - 1) * axis.dilation + 1)
    return int(np.sum(inside & (at % axis.dilation == 0)))


def convolution_flops(rows: int, c_in: int, c_out: int, axes: Sequence[Axis]) -> int:
    """2 x multiplications; `rows` and `c_out` are the output's, `c_in` are those that an output
    sees."""
    return 2 * rows * c_in * c_out * math.prod(meetings(axis) for axis in axes)


def model_flops(function: Callable, *args: Any) -> int:
    """FLOPs of a function of arrays or their shapes; nothing is run. Loops without a number of
    steps raise ValueError."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as jit leaves out the rest
    return count(needed)


def count(jaxpr: Any) -> int:
    """FLOPs of one call of a jaxpr."""
    return sum(of_equation(equation) for equation in jaxpr.eqns)


def of_equation(equation: Any) -> int:
    """FLOPs of one equation, with all that it calls."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return product(equation)
    if name == "conv_general_dilated":
        return convolution(equation)
    if name == "while" and count(params["body_jaxpr"].jaxpr):
        raise ValueError("FLOPs of a loop without a known number of steps")
    inner = [count(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [x for v in params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    values = [getattr(x, "jaxpr", x) for x in values]
    return [x for x in values if hasattr(x, "eqns")]


def product(equation: Any) -> int:
    """2 x elements of the result x length of what is summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def convolution(equation: Any) -> int:
    """FLOPs of `conv_general_dilated`."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    x, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    axes = [
        Axis(
            size=x[numbers.lhs_spec[2 + i]],
            window=kernel[numbers.rhs_spec[2 + i]],
            output=out[numbers.out_spec[2 + i]],
            stride=params["window_strides"][i],
            low=params["padding"][i][0],
            dilation=params["lhs_dilation"][i],
            spread=params["rhs_dilation"][i],
        )
        for i in range(len(params["window_strides"]))
    ]
    rows, c_out = (out[numbers.out_spec[i]] for i in range(2))
    return convolution_flops(rows, kernel[numbers.rhs_spec[1]], c_out, axes)
