# SPDX-License-Identifier: Apache-2.0
"""Claims: pixel scores equal torchmetrics' and scikit-image's; identical pictures have numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from ip2p_jax.evaluation import pixel_scores as module
from ip2p_jax.evaluation.pixel_scores import MOST, PixelScores, pixel_scores
from tests.evaluation.test_clip_scores import photos

TOLERANCE = 1e-4


def score(a: np.ndarray, b: np.ndarray) -> PixelScores:
    # A function of its own for each call: controls change what the tracing meets.
    return PixelScores(*map(np.asarray, jax.jit(lambda a, b: pixel_scores(a, b))(a, b)))


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and the same ones: noisy, darker, on their side, nearly the same, flat."""
    a = photos(72, 72)
    noise = np.random.default_rng(0).normal(0, 20, a[0].shape)
    noisy = np.clip(a[0] + noise, 0, 255).astype(np.uint8)
    nearly = a[3].copy()
    nearly[10, 20] ^= 1
    flat = np.full_like(a[4], 200)
    b = np.stack([noisy, a[1] // 2, a[2].swapaxes(0, 1), nearly, flat])
    return a[:, :64], b[:, :64]


def reference_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By scikit-image, in float64."""
    options: Any = dict(channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5)
    options |= dict(use_sample_covariance=False)
    pairs = zip(a / 255.0, b / 255.0, strict=True)
    return np.array([structural_similarity(x, y, **options) for x, y in pairs])


@pytest.mark.parity
def test_scikit_image(pictures):
    a, b = pictures
    got, expected = score(a, b), reference_ssim(a, b)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(got.ssim, expected, rtol=0, atol=TOLERANCE)
    psnr = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(got.psnr, psnr, rtol=TOLERANCE)
    assert min(psnr) < 10 and 80 < max(psnr) < MOST


@pytest.mark.parity
def test_torchmetrics(pictures):
    """Of whose SSIM the windows within the picture count, as in the paper: it pads, too."""
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255 for x in pictures)
    options: Any = dict(reduction="none", data_range=1.0, return_full_image=True)
    _, windows = structural_similarity_index_measure(a, b, **options)
    got = score(*pictures)
    within = windows[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    np.testing.assert_allclose(got.ssim, within, rtol=0, atol=TOLERANCE)
    assert abs(got.ssim - windows.mean(dim=(1, 2, 3)).numpy()).max() > 10 * TOLERANCE
    np.testing.assert_allclose(got.l1, (a - b).abs().mean(dim=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(got.l2, ((a - b) ** 2).mean(dim=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "value"), [("SIGMA", 1.6), ("RADIUS", 3), ("K2", 0.05)])
def test_control_other_constants(name, value, pictures, monkeypatch):
    monkeypatch.setattr(module, name, value)
    off = abs(score(*pictures).ssim - reference_ssim(*pictures)).max()
    assert off > 10 * TOLERANCE


def test_large_flat_pictures():
    """Where float32 is cut shortest: a bright sky with a little noise, summed over 512 x 512."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(250, 253, (1, 512, 512, 3)).astype(np.uint8) for _ in range(2))
    got = score(a, b)
    np.testing.assert_allclose(got.ssim, reference_ssim(a, b), rtol=0, atol=1e-5)
    difference = a / 255.0 - b / 255.0
    np.testing.assert_allclose(got.l2, (difference**2).mean(), rtol=1e-6)


def test_extremes():
    """Identical pictures; black and white."""
    black = np.zeros((1, 11, 16, 3), np.uint8)
    picture = np.random.default_rng(2).integers(0, 256, black.shape, np.uint8)
    assert score(picture, picture) == PixelScores(*map(np.float32, (0, 0, MOST, 1)))
    apart = score(black, black + 255)
    np.testing.assert_allclose(apart[:3], np.array([[1], [1], [0]]), atol=1e-6)
    np.testing.assert_allclose(apart.ssim, 1e-4, rtol=1e-3)  # K1**2 / (1 + K1**2)


def test_rows_and_types(pictures):
    """float32, one a row, and of that row alone."""
    got = score(*pictures)
    assert all(x.shape == (5,) and x.dtype == np.float32 for x in got)
    alone = score(*(x[2:3] for x in pictures))
    np.testing.assert_array_equal([x[0] for x in alone], [x[2] for x in got])


def test_small_pictures():
    with pytest.raises(ValueError, match="SSIM of pictures of 12 x 10 pixels, expected at least"):
        pixel_scores(*jnp.zeros((2, 1, 10, 12, 3), jnp.uint8))
