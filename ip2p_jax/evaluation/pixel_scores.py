# SPDX-License-Identifier: Apache-2.0
"""How far pictures are from others, pixel by pixel and window by window."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

MOST = 100.0
"""dB, the highest PSNR: identical pictures would have infinity, which JSON does not know."""

RADIUS, SIGMA = 5, 1.5
"""Pixels, of SSIM's Gaussian window of 11 x 11."""

K1, K2 = 0.01, 0.03
"""SSIM's constants for pixels in [0, 1]."""


class PixelScores(NamedTuple):
    """Distances and likenesses of pictures, pixels in [0, 1]."""

    l1: Float[Any, " b"]  # mean absolute error, 0 .. 1
    l2: Float[Any, " b"]  # mean squared error, 0 .. 1
    psnr: Float[Any, " b"]  # dB, at most MOST
    ssim: Float[Any, " b"]  # at most 1, which is that of identical pictures


def pixel_scores(a: UInt8[Array, "b h w 3"], b: UInt8[Array, "b h w 3"]) -> PixelScores:
    """Compares pictures row by row; to be called under jit.

    L1 and L2 as MagicBrush's evaluation has them (Zhang et al. 2023).

    Raises:
      ValueError: pictures smaller than SSIM's window.
    """
    d = a.astype(jnp.int32) - b.astype(jnp.int32)
    l1, l2 = mean(jnp.abs(d)) / 255.0, mean(d * d) / 255.0**2
    psnr = jnp.minimum(-10.0 * jnp.log10(l2), MOST)
    return PixelScores(l1, l2, psnr, ssim(a, b))


def mean(x: Array) -> Float[Array, " b"]:
    """Means over b h w c, line by line: exact sums of integers, and short ones of floats."""
    lines = jnp.sum(x, axis=(2, 3)).astype(jnp.float32) / (x.shape[2] * x.shape[3])
    return jnp.mean(lines, axis=1)


def ssim(a: UInt8[Array, "b h w 3"], b: UInt8[Array, "b h w 3"]) -> Float[Array, " b"]:
    """Structural similarity (Wang et al. 2004), mean over the channels and over the windows that
    lie within the picture.

    Raises:
      ValueError: no window does.
    """
    h, w = a.shape[1:3]
    if min(h, w) < 2 * RADIUS + 1:
        raise ValueError(f"SSIM of pictures of {w} x {h} pixels, expected at least 11 x 11")
    # Variances are small differences of large squares: around grey the squares are smaller.
    a, b = (x.astype(jnp.float32) / 255.0 - 0.5 for x in (a, b))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    return mean(luminance * (2 * covariance + K2**2) / (var_a + var_b + K2**2))


def blur(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Means under the Gaussian window, where it lies within the picture."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    window = [float(p) for p in window / window.sum()]
    for axis in (1, 2):
        n = x.shape[axis] - 2 * RADIUS
        shifted = (jax.lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(len(window)))
        x = sum((p * y for p, y in zip(window, shifted, strict=True)), jnp.zeros(()))
    return x
