# SPDX-License-Identifier: Apache-2.0
"""Claims: porting is strict and exact in both directions; SD 1.5 has the published size."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import SD15
from ip2p_jax.models.unet import UNet
from ip2p_jax.weights.port import from_torch, leaves, to_torch, torch_shape

ABSTRACT = {
    "conv": {"kernel": np.empty((3, 3, 2, 5)), "bias": np.empty(5)},
    "blocks": {0: {"linear": {"weight": np.empty((6, 4))}}, 1: {"norm": {"scale": np.empty(4)}}},
    "embed": {"embedding": np.empty((7, 3))},
}
SHAPES = {
    "conv.weight": (5, 2, 3, 3),
    "conv.bias": (5,),
    "blocks.0.linear.weight": (6, 4),
    "blocks.1.norm.weight": (4,),
    "embed.weight": (7, 3),
}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_layout_and_names(tensors):
    params = from_torch(ABSTRACT, tensors)
    np.testing.assert_array_equal(
        params["conv"]["kernel"], tensors["conv.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        params["blocks"][0]["linear"]["weight"], tensors["blocks.0.linear.weight"]
    )
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["embed.weight"])
    assert {n: torch_shape(p, x.shape) for (p, x), n in zip(leaves(params), SHAPES, strict=True)}


def test_round_trip_is_exact_and_copies_nothing(tensors):
    params = from_torch(ABSTRACT, tensors)
    back = to_torch(params)
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x)
        assert np.shares_memory(back[name], x)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_floats_become_float32(tensors, dtype):
    import ml_dtypes  # noqa: F401  (names bfloat16)

    params = from_torch(ABSTRACT, {n: x.astype(dtype) for n, x in tensors.items()})
    assert {x.dtype for _, x in leaves(params)} == {np.dtype(np.float32)}
    want = tensors["conv.bias"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(params["conv"]["bias"], want)


def test_every_fault_is_named_with_its_shapes(tensors):
    del tensors["conv.bias"]
    tensors["stray.weight"] = np.zeros((2, 2), np.float32)
    tensors["blocks.0.linear.weight"] = np.zeros((6, 5), np.float32)
    tensors["embed.weight"] = np.zeros((7, 3), np.int64)
    with pytest.raises(ValueError) as error:
        from_torch(ABSTRACT, tensors, "some.file")
    assert str(error.value) == (
        "some.file: 1 tensor missing: conv.bias (5,); 1 tensor unexpected: stray.weight (2, 2); "
        "1 tensor of another shape: blocks.0.linear.weight (6, 5), expected (6, 4); "
        "1 tensor of another type: embed.weight int64"
    )


def test_a_linear_layer_and_a_1x1_convolution_are_the_same(tensors):
    weight = tensors["blocks.0.linear.weight"]
    linear = from_torch(ABSTRACT, tensors)
    conv = from_torch(ABSTRACT, {**tensors, "blocks.0.linear.weight": weight[:, :, None, None]})
    np.testing.assert_array_equal(
        conv["blocks"][0]["linear"]["weight"], linear["blocks"][0]["linear"]["weight"]
    )
    as_conv = {"proj_in": {"kernel": np.empty((1, 1, 4, 6))}}
    ported = from_torch(as_conv, {"proj_in.weight": weight})
    np.testing.assert_array_equal(ported["proj_in"]["kernel"][0, 0], weight.T)
    with pytest.raises(ValueError, match=r"\(6, 4, 3, 3\), expected \(6, 4\)"):
        from_torch(ABSTRACT, {**tensors, "blocks.0.linear.weight": np.zeros((6, 4, 3, 3))})


@pytest.mark.parametrize(("in_channels", "size"), [(4, 859_520_964), (8, 859_532_484)])
def test_sd15_has_the_published_number_of_parameters(in_channels, size):
    _, params = abstract(UNet, replace(SD15.unet, in_channels=in_channels))
    shapes = [x.shape for _, x in leaves(params)]
    assert (len(shapes), sum(map(math.prod, shapes))) == (686, size)
