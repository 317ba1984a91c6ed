# SPDX-License-Identifier: Apache-2.0
"""A very small VAE, and the latents that the command makes with it."""

from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from diffusers import AutoencoderKL

from ip2p_jax import cache_latents
from tests.oracles import randomize

SIZES: Any = dict(
    sample_size=16,
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=8,
)


def small_vae(seed: int = 0) -> AutoencoderKL:
    """Pictures to latents half their side."""
    vae = AutoencoderKL(**SIZES)
    randomize(vae, seed)
    return vae


def moments(vae: AutoencoderKL, pixels) -> tuple:
    """What diffusers makes of pictures (uint8, b h w 3): mean and log-variance, b h w z."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(z.permute(0, 2, 3, 1).numpy() for z in (posterior.mean, posterior.logvar))


def run(data: Path, model: Path, output: Path, *more: str, devices: int = 1) -> int:
    """The command, in this process, on some of its devices."""
    options = [f"--data={data}", f"--model={model}", f"--output={output}", "--resolution=16"]
    some = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: some)
        return cache_latents.main([*options, *more])
