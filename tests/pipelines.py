# SPDX-License-Identifier: Apache-2.0
"""diffusers' pipelines on torch, and how far what we make is from what they make."""

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.oracles import SCHEDULE

LATENTS = 1e-4  # maximum error relative to the largest value
PSNR = 60.0  # dB, of the picture
STEPS = 10
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
OPTIONS = {"ddim": dict(set_alpha_to_one=False, clip_sample=False, steps_offset=1)}


def noise(size: tuple[int, int], factor: int = 4, seed: int = 0) -> np.ndarray:
    """Unit noise for a picture of this width and height."""
    shape = (1, size[1] // factor, size[0] // factor, 4)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    mse = np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(mse, 1e-12)))


class Theirs:
    """A pipeline of diffusers, and what it makes of one start noise."""

    def __init__(self, pipeline: type, folder):
        scheduler = DDIMScheduler(**SCHEDULE, **OPTIONS["ddim"])  # replaced at each call
        self.pipe = pipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, start: np.ndarray, sampler: str = "ddim", steps: int = STEPS, **arguments):
        """Final latents (b h w c) and the picture (uint8)."""
        self.pipe.scheduler = SCHEDULERS[sampler](**SCHEDULE, **OPTIONS.get(sampler, {}))
        latents = self.pipe(
            num_inference_steps=steps,
            latents=torch.from_numpy(start).permute(0, 3, 1, 2),
            output_type="latent",
            **arguments,
        ).images
        with torch.no_grad():
            z = latents / self.pipe.vae.config.scaling_factor
            pixels = self.pipe.vae.decode(z).sample
        picture = self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        return latents.permute(0, 2, 3, 1).numpy(), np.asarray(picture)
