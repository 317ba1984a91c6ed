# SPDX-License-Identifier: Apache-2.0
"""Editor: pictures and instructions in, edited pictures out, through one compiled program.

editor = Editor.from_pretrained("photos")
[winter] = editor(Image.open("street.jpg"), "make it winter", image_guidance=1.6)
"""

import functools
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8
from PIL import Image

from ip2p_jax.data.pictures import to_rgb
from ip2p_jax.diffusion import schedule as schedules
from ip2p_jax.diffusion.denoise import denoiser, guide_edit, one_batch
from ip2p_jax.diffusion.grids import Grid, grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS, Sampler
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.sizes import edit_size, fit
from ip2p_jax.types import Conditioning, Params
from ip2p_jax.weights.load import Pretrained, load


class EditBatch(NamedTuple):
    """One row per picture; all of one size."""

    images: UInt8[Any, "b h w 3"]
    tokens: Int32[Any, "b n"]
    negative: Int32[Any, "b n"]
    text_guidance: Float32[Any, " b"]
    image_guidance: Float32[Any, " b"]
    noise: Float32[Any, "b h w z"]
    keys: Key[Array, " b"]


class Edited(NamedTuple):
    """The result of a batch: pictures, and the scaled latents they were decoded from."""

    images: UInt8[Any, "b h w 3"]
    latents: Float32[Any, "b h w z"]


class Editor:
    """Edits pictures by instruction with an InstructPix2Pix model.

    `dtype` is the type of the networks' parameters and arithmetic (None: bfloat16 on TPU and GPU,
    float32 on the CPU). Batches are split over `devices` (None: all local ones; on the CPU one,
    for its devices share the same cores), at most `rows` pictures a device at once (None: 8; on the
    CPU 1, for at SD's size a row takes gigabytes there and more rows are no faster).
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[Any] | None = None,
        rows: int | None = None,
    ):
        config = pretrained.config
        if config.unet.in_channels != 2 * config.vae.latent_channels:
            raise ValueError(
                f"the UNet's conv_in.weight takes {config.unet.in_channels} channels, an editing "
                f"model's {2 * config.vae.latent_channels}: this is no InstructPix2Pix model"
            )
        on_cpu = jax.default_backend() == "cpu"
        if devices is None:
            devices = jax.local_devices()[: 1 if on_cpu else None]
        self.rows = rows or (1 if on_cpu else 8)
        self.dtype = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
        self.config = config
        self.tokenizer = pretrained.tokenizer
        self.scheduler = pretrained.scheduler
        self.schedule = schedules.STABLE_DIFFUSION
        if self.scheduler is not None:
            self.schedule = schedules.from_diffusers(self.scheduler)
        mesh = Mesh(np.asarray(devices), ("data",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.by_row = NamedSharding(mesh, PartitionSpec("data"))
        self.params = jax.tree.map(
            lambda x: jax.device_put(np.asarray(x, self.dtype), self.replicated),
            {name: pretrained.params[name] for name in ("unet", "vae", "text")},
        )
        self.program = functools.cache(self.build_program)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
    ) -> "Editor":
        """Opens `model`: an embedded model's name, a diffusers folder, an LDM file, a run directory
        or a hub id (of which `revision` and `variant` choose the version)."""
        return cls(load(model, revision=revision, variant=variant), dtype=dtype)

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
    ) -> list[Image.Image]:
        """Edits each picture by its instruction; scalars hold for all pictures.

        steps: sampling steps, 1..1000. sampler: euler_ancestral, euler, heun, ddim or dpmpp_2m.
        text_guidance, image_guidance: s_T and s_I of the paper, any real numbers.
        negative: a text that takes the place of the empty text in the lower guidance branches.
        latents: unit noise (b, h / f, w / f, 4) to start from, f = 8 for SD; else by `seed`.
        resolution: None keeps a picture's own size, rounded down to what the networks take; a
          number (512) applies the paper's rule. A picture whose instruction is empty comes back
          resized only.

        A result depends on its own row of the arguments alone: bit for bit at equal numbers of rows
        a device, else but for the rounding of float32. Raises ValueError for anything that
        cannot be used.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        n = len(images)
        rows = {
            "instructions": per_picture("instructions", instructions, n, check_text),
            "text_guidance": per_picture("text_guidance", text_guidance, n, check_number),
            "image_guidance": per_picture("image_guidance", image_guidance, n, check_number),
            "seed": per_picture("seed", seed, n, check_seed),
            "negative": per_picture(
                "negative", "" if negative is None else negative, n, check_text
            ),
        }
        if latents is not None and len(latents) != n:
            raise ValueError(f"latents: {len(latents)} rows for {n} pictures")
        upright = [to_rgb(x) for x in images]
        fitted = [fit(x, edit_size(x.size, resolution, self.config.multiple)) for x in upright]
        results = list(fitted)
        for chunk in self.chunks(fitted, rows["instructions"]):
            picked = {name: [values[i] for i in chunk] for name, values in rows.items()}
            start = None if latents is None else np.asarray(latents, np.float32)[chunk]
            batch = self.batch([fitted[i] for i in chunk], start, **picked)
            edited = self.edit(batch, steps, sampler)
            for i, pixels in zip(chunk, np.asarray(edited.images), strict=True):
                results[i] = Image.fromarray(pixels)
        return results

    def chunks(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[list[int]]:
        """Indices of pictures to edit, in groups of one size and at most `rows` a device."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, (image, instruction) in enumerate(zip(images, instructions, strict=True)):
            if instruction.strip():
                by_size.setdefault(image.size, []).append(i)
        most = self.rows * self.by_row.mesh.size
        return [s[i : i + most] for s in by_size.values() for i in range(0, len(s), most)]

    def batch(
        self,
        images: Sequence[Image.Image],
        latents: Float32[np.ndarray, "b h w z"] | None,
        *,
        instructions: Sequence[str],
        text_guidance: Sequence[float],
        image_guidance: Sequence[float],
        seed: Sequence[int],
        negative: Sequence[str],
    ) -> EditBatch:
        """Arrays for pictures of one size; the start noise is drawn from the seeds if not given."""
        start_keys, step_keys = seed_keys(np.asarray(seed, np.uint32))
        width, height = images[0].size
        factor, channels = self.config.vae.factor, self.config.vae.latent_channels
        shape = (height // factor, width // factor, channels)
        if latents is None:
            latents = jax.jit(unit_noise, static_argnums=1)(start_keys, shape)
        elif latents.shape[1:] != shape:
            raise ValueError(f"latents: shape {latents.shape}, expected {(len(images), *shape)}")
        return EditBatch(
            images=np.stack([np.asarray(x) for x in images]),
            tokens=self.tokenize(instructions),
            negative=self.tokenize(negative),
            text_guidance=np.asarray(text_guidance, np.float32),
            image_guidance=np.asarray(image_guidance, np.float32),
            noise=latents,
            keys=step_keys,
        )

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """CLIP's tokens, cut and padded to the length of the text tower."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.config.text.positions,
        )
        return np.asarray(tokens.input_ids, np.int32)

    def edit(self, batch: EditBatch, steps: int, sampler: str) -> Edited:
        """Runs the compiled program on a batch; rows are added and dropped to fill the devices."""
        points = grid(sampler, steps, self.schedule, self.scheduler)
        n = len(batch.images)
        rows = padded_rows(n, self.by_row.mesh.size)
        fill = np.arange(rows) % n  # the padding repeats rows; they are dropped again below
        batch = jax.tree.map(lambda x: jax.device_put(x[fill], self.by_row), batch)
        points = jax.device_put(points, self.replicated)
        edited = self.program(sampler)(self.params, batch, points)
        return Edited(*(np.asarray(x)[:n] for x in edited))

    def build_program(self, sampler: str) -> Callable[[Params, EditBatch, Grid], Edited]:
        """The whole edit as one jitted function; compiled once per shape and number of steps."""
        config = self.config
        unet, _ = abstract(UNet, config.unet, dtype=self.dtype)
        vae, _ = abstract(VAE, config.vae, dtype=self.dtype)
        text, _ = abstract(CLIPText, config.text, dtype=self.dtype)
        # Without this, float32 products are of lower precision on TPU and GPU.
        precision = "highest" if self.dtype == jnp.float32 else "default"

        def program(params: Params, batch: EditBatch, points: Grid) -> Edited:
            with jax.default_matmul_precision(precision):
                return edit_batch(
                    Networks(unet, vae, text),
                    SAMPLERS[sampler],
                    self.schedule,
                    config.vae.scaling_factor,
                    params,
                    batch,
                    points,
                )

        return jax.jit(program, out_shardings=self.by_row)


class Networks(NamedTuple):
    """The graph definitions of the three networks."""

    unet: Any
    vae: Any
    text: Any


def edit_batch(
    networks: Networks,
    sample: Sampler,
    schedule: schedules.Schedule,
    scaling_factor: float,
    params: Params,
    batch: EditBatch,
    points: Grid,
) -> Edited:
    """Encodes, samples under two guidance scales, decodes (sections 3.2 and 3.2.1)."""
    vae = nnx.merge(networks.vae, params["vae"])
    encode_text = nnx.merge(networks.text, params["text"])

    def network(z, t, text):
        return nnx.merge(networks.unet, params["unet"])(z, t, text)

    pixels = batch.images.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    cond = Conditioning(text=encode_text(batch.tokens), image=vae.encode(pixels).mean)
    denoise = guide_edit(
        denoiser(one_batch(network), schedule),
        cond,
        encode_text(batch.negative),
        batch.text_guidance,
        batch.image_guidance,
    )
    z = sample(denoise, batch.noise, points, batch.keys)
    return Edited(to_uint8(vae.decode(z / scaling_factor)), z)


def to_uint8(x: Float[Array, "b h w 3"]) -> UInt8[Array, "b h w 3"]:
    """Pixels from [-1, 1], clipped and rounded."""
    return jnp.round(jnp.clip(x / 2.0 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


@jax.jit
def seed_keys(seeds: Any) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """Two keys a picture: for the start noise and for the noise of the steps."""
    return tuple(jax.vmap(lambda s: jax.random.split(jax.random.key(s)), out_axes=1)(seeds))


def padded_rows(n: int, devices: int) -> int:
    """The next power of two of rows a device, so that few batch sizes are compiled."""
    rows = -(-n // devices)
    return devices * 2 ** (rows - 1).bit_length()


def per_picture(name: str, value: Any, n: int, check: Callable[[Any], str | None]) -> list:
    """`value` for each of n pictures: itself if it is one, else n of them; each one checked."""
    values = [value] * n if np.ndim(value) == 0 else list(value)
    if len(values) != n:
        raise ValueError(f"{name}: {len(values)} values for {n} pictures")
    for x in values:
        if wanted := check(x):
            raise ValueError(f"{name}: {x!r}, expected {wanted}")
    return values


def check_text(x: Any) -> str | None:
    return None if isinstance(x, str) else "a text"


def check_number(x: Any) -> str | None:
    return None if isinstance(x, Real) and np.isfinite(float(x)) else "a finite number"


def check_seed(x: Any) -> str | None:
    whole = isinstance(x, Integral) and 0 <= int(x) < 2**32
    return None if whole else "an integer from 0 to 2^32 - 1"
