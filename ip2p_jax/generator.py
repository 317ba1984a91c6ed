# SPDX-License-Identifier: Apache-2.0
"""Generator: texts in, pictures out, through one compiled program (Stable Diffusion).

generator = Generator.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
[cat] = generator("a photograph of a cat", steps=25, sampler="dpmpp_2m")
"""

import functools
from collections.abc import Sequence
from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Float
from PIL import Image

from ip2p_jax import checks, guided
from ip2p_jax.checks import per_picture
from ip2p_jax.guided import Pictures, TextBatch
from ip2p_jax.placed import place, rows_per_device
from ip2p_jax.sizes import check_size
from ip2p_jax.weights.load import Pretrained, load


class Generator:
    """Makes pictures of texts with a Stable Diffusion model; built as an `Editor` is."""

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[Any] | None = None,
        rows: int | None = None,
    ):
        checks.generates(pretrained.config)
        self.model = place(pretrained, dtype=dtype, devices=devices)
        self.rows = rows_per_device(rows)
        self.program = functools.cache(functools.partial(self.model.compile, guided.generate))

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
    ) -> "Generator":
        """Opens `model` as `Editor.from_pretrained` does."""
        return cls(load(model, revision=revision, variant=variant, vae=vae), dtype=dtype)

    @property
    def most(self) -> int:
        """How many pictures are computed at once."""
        return self.rows * self.model.devices

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int = 100,
        sampler: str = "euler_ancestral",
        text_guidance: float | Sequence[float] = 7.5,
        seed: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        latents: Float[Any, "b h w z"] | None = None,
        size: tuple[int, int] | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> list[Image.Image]:
        """Makes a picture of each prompt; scalars hold for all pictures.

        steps, sampler, text_guidance, seed, negative, latents, guidance_rescale,
          guidance_interval: as `Editor` takes them.
        size: width and height in pixels, multiples of what the networks take (64 for SD); None:
          the model's own (512x512 for SD 1.5).

        A result depends on its own row of the arguments alone, as the Editor's does. Raises
        ValueError for anything that cannot be used.
        """
        checks.check("guidance_interval", guidance_interval, checks.interval)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n = len(prompts)
        rows = {
            "prompts": per_picture("prompts", prompts, n, checks.text),
            "text_guidance": per_picture("text_guidance", text_guidance, n, checks.number),
            "guidance_rescale": per_picture("guidance_rescale", guidance_rescale, n, checks.share),
            "seed": per_picture("seed", seed, n, checks.seed),
            "negative": per_picture(
                "negative", "" if negative is None else negative, n, checks.text
            ),
        }
        if latents is not None and len(latents) != n:
            raise ValueError(f"latents: {len(latents)} rows for {n} pictures")
        results = []
        for i in range(0, n, self.most):
            chunk = slice(i, i + self.most)
            picked = {name: values[chunk] for name, values in rows.items()}
            start = None if latents is None else latents[chunk]
            batch = self.batch(start, size, **picked)
            made = self.generate(batch, steps, sampler, guidance_interval)
            results += map(Image.fromarray, made.images)
        return results

    def batch(
        self,
        latents: Float[Any, "b h w z"] | None,
        size: tuple[int, int] | None,
        *,
        prompts: Sequence[str],
        text_guidance: Sequence[float],
        seed: Sequence[int],
        negative: Sequence[str],
        guidance_rescale: Sequence[float] | None = None,
    ) -> TextBatch:
        """Arrays for pictures of one size; the start noise is drawn from the seeds if not given."""
        size = size or (self.model.resolution, self.model.resolution)
        check_size(size, self.model.config.multiple)
        return self.model.text_batch(
            prompts, negative, text_guidance, seed, latents, size, guidance_rescale
        )

    def generate(
        self,
        batch: TextBatch,
        steps: int,
        sampler: str,
        guidance_interval: Sequence[float] | None = None,
    ) -> Pictures:
        """Runs the compiled program on a batch."""
        points = self.model.grid(sampler, steps, guidance_interval)
        return self.model.run(self.program(sampler), batch, points)
