# SPDX-License-Identifier: Apache-2.0
"""Editor: pictures and instructions in, edited pictures out, through one compiled program.

editor = Editor.from_pretrained("photos")
[winter] = editor(Image.open("street.jpg"), "make it winter", image_guidance=1.6)
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float
from PIL import Image

from ip2p_jax import checks, guided
from ip2p_jax.checks import per_picture
from ip2p_jax.data.pictures import to_rgb
from ip2p_jax.guided import EditBatch, Pictures
from ip2p_jax.placed import place, rows_per_device
from ip2p_jax.sizes import edit_size, fit
from ip2p_jax.weights.load import Pretrained, load


class Editor:
    """Edits pictures by instruction with an InstructPix2Pix model.

    `dtype` is the type of the networks' parameters and arithmetic (None: bfloat16 on TPU and GPU,
    float32 on the CPU). Batches are split over `devices` (None: all local ones; on the CPU one),
    at most `rows` pictures a device at once (None: 8; on the CPU 1); of a single picture, each
    device computes a branch of the guidance.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[Any] | None = None,
        rows: int | None = None,
    ):
        checks.edits(pretrained.config)
        self.model = place(pretrained, dtype=dtype, devices=devices)
        self.rows = rows_per_device(rows)
        self.program = functools.cache(functools.partial(self.model.compile, guided.edit))

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
    ) -> "Editor":
        """Opens `model`: an embedded model's name, a diffusers folder, an LDM file, a run directory
        or a hub id (of which `revision` and `variant` choose the version). `vae` is a model whose
        VAE takes the place of its own."""
        return cls(load(model, revision=revision, variant=variant, vae=vae), dtype=dtype)

    @property
    def most(self) -> int:
        """How many pictures are computed at once."""
        return self.rows * self.model.devices

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        instructions: str | Sequence[str],
        steps: int = 100,
        sampler: str = "euler_ancestral",
        text_guidance: float | Sequence[float] = 7.5,
        image_guidance: float | Sequence[float] = 1.5,
        seed: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        latents: Float[Any, "b h w z"] | None = None,
        resolution: int | None = None,
        guidance_rescale: float | Sequence[float] = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> list[Image.Image]:
        """Edits each picture by its instruction; scalars hold for all pictures.

        steps: sampling steps, 1..1000. sampler: euler_ancestral, euler, heun, ddim or dpmpp_2m.
        text_guidance, image_guidance: s_T and s_I of the paper, any real numbers.
        negative: a text that takes the place of the empty text in the lower guidance branches.
        latents: unit noise (b, h / f, w / f, 4) to start from, f = 8 for SD; else by `seed`.
        resolution: None keeps a picture's own size, rounded down to what the networks take; a
          number (512) applies the paper's rule. A picture whose instruction is empty comes back
          resized only.
        guidance_rescale: 0 to 1, how far the contrast that strong guidance adds is taken back (Lin
          et al. 2024, section 3.4: 0.7).
        guidance_interval: noise levels, sigma, between which guidance acts (Kynkäänniemi et al.
          2024: 0.28 to 5.42 for SDXL); steps at others compute one branch of three. None: all.

        A result depends on its own row of the arguments alone: bit for bit at equal numbers of rows
        a device, else but for the rounding of float32. Raises ValueError for anything that
        cannot be used.
        """
        checks.check("guidance_interval", guidance_interval, checks.interval)
        images = [images] if isinstance(images, Image.Image) else list(images)
        n = len(images)
        rows = {
            "instructions": per_picture("instructions", instructions, n, checks.text),
            "text_guidance": per_picture("text_guidance", text_guidance, n, checks.number),
            "image_guidance": per_picture("image_guidance", image_guidance, n, checks.number),
            "guidance_rescale": per_picture("guidance_rescale", guidance_rescale, n, checks.share),
            "seed": per_picture("seed", seed, n, checks.seed),
            "negative": per_picture(
                "negative", "" if negative is None else negative, n, checks.text
            ),
        }
        if latents is not None and len(latents) != n:
            raise ValueError(f"latents: {len(latents)} rows for {n} pictures")
        upright, multiple = [to_rgb(x) for x in images], self.model.config.multiple
        fitted = [fit(x, edit_size(x.size, resolution, multiple)) for x in upright]
        results = list(fitted)
        for chunk in self.chunks(fitted, rows["instructions"]):
            picked = {name: [values[i] for i in chunk] for name, values in rows.items()}
            start = None if latents is None else latents[np.asarray(chunk)]
            batch = self.batch([fitted[i] for i in chunk], start, **picked)
            edited = self.edit(batch, steps, sampler, guidance_interval)
            for i, pixels in zip(chunk, edited.images, strict=True):
                results[i] = Image.fromarray(pixels)
        return results

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]],
        steps: int = 100,
        sampler: str = "euler_ancestral",
        guidance_interval: Sequence[float] | None = None,
    ) -> None:
        """Compiles what edits of these sizes (width, height) need, for every number of pictures, or
        reads what was kept: no later edit with these steps waits for a compiler.

        Raises ValueError for a size that the networks do not take.
        """
        checks.check("guidance_interval", guidance_interval, checks.interval)
        points = self.model.grid(sampler, steps, guidance_interval)
        multiple = self.model.config.multiple
        for size in sizes:
            if min(size) < 1 or any(side % multiple for side in size):
                raise ValueError(f"sizes: {size}, expected multiples of {multiple} px")
            for n in range(1, self.most + 1):  # their seeds and noise are programs, too
                batch = self.batch(
                    [Image.new("RGB", size)] * n,
                    None,
                    instructions=[""] * n,
                    text_guidance=[0.0] * n,
                    image_guidance=[0.0] * n,
                    seed=[0] * n,
                    negative=[""] * n,
                )
                args = self.model.arguments(batch, points)
                self.program(sampler).compile(self.model.shapes, *args)

    def chunks(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[list[int]]:
        """Indices of pictures to edit, in groups of one size that are computed at once."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, (image, instruction) in enumerate(zip(images, instructions, strict=True)):
            if instruction.strip():
                by_size.setdefault(image.size, []).append(i)
        return [s[i : i + self.most] for s in by_size.values() for i in range(0, len(s), self.most)]

    def batch(
        self,
        images: Sequence[Image.Image],
        latents: Float[Any, "b h w z"] | None,
        *,
        instructions: Sequence[str],
        text_guidance: Sequence[float],
        image_guidance: Sequence[float],
        seed: Sequence[int],
        negative: Sequence[str],
        guidance_rescale: Sequence[float] | None = None,
    ) -> EditBatch:
        """Arrays for pictures of one size; the start noise is drawn from the seeds if not given."""
        text = self.model.text_batch(
            instructions, negative, text_guidance, seed, latents, images[0].size, guidance_rescale
        )
        pixels = np.stack([np.asarray(x) for x in images])
        return EditBatch(text, pixels, np.asarray(image_guidance, np.float32))

    def edit(
        self,
        batch: EditBatch,
        steps: int,
        sampler: str,
        guidance_interval: Sequence[float] | None = None,
    ) -> Pictures:
        """Runs the compiled program on a batch."""
        points = self.model.grid(sampler, steps, guidance_interval)
        return self.model.run(self.program(sampler), batch, points)
