# SPDX-License-Identifier: Apache-2.0
"""Claims: of a compiled program's text, cycles, FLOPs, loops and collectives are found as they are
written; a program that libtpu compiles here gives the numbers that are known of the chip.

scan.hlo is what was compiled for v4-8, cut to what is read, of `x @ w` and five steps of
`c = tanh(c @ w)`; `w` is split over two chips.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ip2p_jax.models.attention import Place
from ip2p_jax.models.flash import attend_on
from ip2p_jax.programs import compiled_anew
from ip2p_jax.tpu import hlo

SCAN = (Path(__file__).parent / "scan.hlo").read_text()
W = 4096


def test_a_program_is_summed_as_it_runs():
    cost = hlo.cost(SCAN)
    assert cost.loops == {"while.13": 5}
    assert cost.cycles == {
        "product": 1135243 + 5 * 81256,
        "copies, layouts and types": 20662 + 5 * 16094,
        "reduction": 15070 + 611,
    }
    assert cost.flops == 2 * 8192 * W * W + 5 * 2 * 512 * W * W
    assert cost.calls == {"all-gather": 1 + 5, "all-reduce": 1}
    assert cost.bytes == {"all-gather": 6 * 2 * W * W, "all-reduce": 2 * 5}
    assert cost.custom == {} and cost.float32_convolutions == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("s32[] constant(5)", "s32[] parameter(1)"),
        ("s32[] add(%copy.5", "s32[] multiply(%copy.5"),
    ],
)
def test_a_loop_that_cannot_be_counted_is_refused_by_name(old, new):
    assert old in SCAN
    with pytest.raises(ValueError, match="the loop %while.13 of the compiled program runs no"):
        hlo.cost(SCAN.replace(old, new))


def test_a_count_that_the_text_states_is_taken():
    text = SCAN.replace('op_name="while"}', 'op_name="while"}, x={"known_trip_count":{"n":"7"}}')
    assert hlo.cost(text).loops == {"while.13": 7}


def test_custom_calls_are_listed():
    """Those that take no time are not."""
    assert hlo.cost(SCAN.replace("AllocateBuffer", "tpu_custom_call")).custom == {
        "tpu_custom_call": 1
    }


def test_bytes_of_shapes():
    assert hlo.bytes_of("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[], pred[3])") == 2048 + 4 + 3


def compiled(function: Any, *shapes: Any) -> hlo.Cost:
    with compiled_anew():
        return hlo.cost(str(jax.jit(function).lower(*shapes).compile().as_text()))


def test_a_large_product_takes_most_of_the_peak(v4, chip):
    """92.8 %, by 8192 x 8192; FLOPs are exact."""
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=chip)
    cost = compiled(jnp.dot, x, x)
    assert cost.flops == 2 * 8192**3
    seconds = cost.cycles.total() / v4.chip.clock
    assert 0.90 < cost.flops / seconds / v4.chip.peak < 0.97
    assert set(cost.cycles) == {"product"}


def test_a_convolution(chip):
    """Products in float32 are seen. Control: there are none in bfloat16."""
    highest = jax.lax.Precision.HIGHEST
    for dtype, precision, wide in ((jnp.bfloat16, None, 0), (jnp.float32, highest, 1)):
        x = jax.ShapeDtypeStruct((8, 16, 16, 128), dtype, sharding=chip)
        kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), dtype, sharding=chip)

        def convolve(x, kernel):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,  # noqa: B023
            )

        cost = compiled(convolve, x, kernel)
        assert cost.flops == 2 * 8 * 128 * 128 * 46**2  # 46 of 48 positions meet an input
        assert cost.cycles["convolution"] > 0
        assert cost.float32_convolutions == wide


def test_kernels_are_counted_with_what_they_compute_again(v4, chip):
    """Attention of 1024 positions, forward and backward: 6 products as the model has it, 7 in the
    kernels, and 31 % of the product units' width is used by heads of 40."""
    place, how = Place("", False, 32, 32), attend_on(chip)
    x = jax.ShapeDtypeStruct((8, 1024, 2, 40), jnp.bfloat16, sharding=chip)

    def gradient(q, k, v, upstream):
        out, back = jax.vjp(lambda *qkv: how(place, *qkv), q, k, v)
        return out, back(upstream)

    cost = compiled(gradient, x, x, x, x)
    each = 2 * 8 * 2 * 1024**2 * 40
    assert cost.custom == {} and cost.kernels.total() == 2
    assert sorted(kernel.flops for kernel in cost.kernels) == [2 * each, 5 * each]
    assert all(kernel.padded * 40 == kernel.flops * 128 for kernel in cost.kernels)
    assert all(kernel.bytes > 4 * 8 * 2 * 1024 * 40 * 2 for kernel in cost.kernels)
    assert cost.cycles["product"] == 0  # attributes over several lines hide nothing behind them
    assert cost.cycles.total() > 0
