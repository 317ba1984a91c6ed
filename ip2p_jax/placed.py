# SPDX-License-Identifier: Apache-2.0
"""A model put on devices: what editing, generating and making pairs share."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Float, Int32
from transformers import CLIPTokenizer

from ip2p_jax.data.tokens import tokenize
from ip2p_jax.devices import put, shapes, shardings
from ip2p_jax.diffusion.grids import Grid, grid
from ip2p_jax.diffusion.noise import unit_noise
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, Schedule, from_diffusers
from ip2p_jax.guided import TextBatch, seed_keys
from ip2p_jax.models.flash import attend_on
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.networks import Networks, networks
from ip2p_jax.programs import Program
from ip2p_jax.types import Params
from ip2p_jax.weights.load import Pretrained


@dataclass(frozen=True)
class Placed:
    """A model whose parameters (by part "unet", "vae", "text") lie whole on each device, or are on
    their way there. Batches are split over the devices by row; those of too few pictures lie on
    all, and the UNet's guidance branches are split.
    """

    config: ModelConfig
    networks: Networks
    shapes: Params
    arriving: Future[Params]
    tokenizer: CLIPTokenizer
    schedule: Schedule
    scheduler: dict | None  # scheduler_config.json; None: k-diffusion's conventions
    dtype: Any
    by_row: NamedSharding
    replicated: NamedSharding

    @property
    def params(self) -> Params:
        """The parameters on the devices; waits until they are there."""
        return self.arriving.result()

    @property
    def precision(self) -> str:
        """Of products: without "highest", those of float32 are cut short on TPU and GPU."""
        return "highest" if self.dtype == jnp.float32 else "default"

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.by_row.mesh.size

    @property
    def resolution(self) -> int:
        """The side in pixels of the pictures it was made for (512 for SD 1.5)."""
        return self.config.unet.sample_size * self.config.vae.factor

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """CLIP's tokens, cut and padded to the length of the text tower."""
        return tokenize(self.tokenizer, texts, self.config.text.positions)

    def grid(self, sampler: str, steps: int, guided: Sequence[float] | None = None) -> Grid:
        """The noise levels of a sampler on this model, and those between which it is guided (None:
        all); ValueError if it cannot have them."""
        points = grid(sampler, steps, self.schedule, self.scheduler)
        return points._replace(guided=None if guided is None else np.asarray(guided, np.float32))

    def text_batch(
        self,
        texts: Sequence[str],
        negative: Sequence[str],
        text_guidance: Sequence[float],
        seeds: Sequence[int],
        latents: Float[Any, "b h w z"] | None,
        size: tuple[int, int],
        guidance_rescale: Sequence[float] | None = None,
    ) -> TextBatch:
        """Rows for pictures of `size` (width, height).

        Start noise and the keys for that of the steps come from the seeds, but for the start noise
        that `latents` are. Nothing is rescaled where `guidance_rescale` is None.
        """
        start_keys, step_keys = seed_keys(np.asarray(seeds, np.uint32))
        (width, height), vae = size, self.config.vae
        shape = (height // vae.factor, width // vae.factor, vae.latent_channels)
        if latents is None:
            noise = jax.jit(unit_noise, static_argnums=1)(start_keys, shape)
        elif latents.shape[1:] == shape:
            noise = latents.astype(np.float32)
        else:
            raise ValueError(f"latents: shape {latents.shape}, expected {(len(texts), *shape)}")
        return TextBatch(
            tokens=self.tokenize(texts),
            negative=self.tokenize(negative),
            text_guidance=np.asarray(text_guidance, np.float32),
            noise=noise,
            keys=step_keys,
            rescale=np.asarray(guidance_rescale or np.zeros(len(texts)), np.float32),
        )

    def compile(self, function: Callable, sampler: str, *, keep: bool = True) -> Program:
        """`guided.edit` or `guided.generate` of this model, to be called with parameters, batch and
        grid; results lie as the batch does. `keep` is for functions of this library only."""
        scaling = self.config.vae.scaling_factor
        bound = functools.partial(
            function, SAMPLERS[sampler], self.schedule, self.networks, scaling
        )

        def program(params: Params, batch: Any, points: Grid) -> Any:
            with jax.default_matmul_precision(self.precision):
                result = bound(params, batch, points)
            return jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(x, self.rows(len(x))), result
            )

        identity = (function, sampler, self.config, self.schedule, str(self.dtype))
        return Program(program, identity if keep else None)

    def rows(self, n: int) -> NamedSharding:
        """How the rows of a batch of n lie on the devices."""
        return self.by_row if n % self.devices == 0 else self.replicated

    def run(self, program: Program, batch: Any, points: Grid) -> Any:
        """Runs a compiled function on a batch of any number of rows; the result is on the host.

        Rows are repeated to fill a batch, and dropped again. The program is read or compiled
        while the parameters still arrive.
        """
        n = len(jax.tree.leaves(batch)[0])
        args = self.arguments(batch, points)
        program.compile(self.shapes, *args)
        result = program(self.params, *args)
        return jax.tree.map(lambda x: np.asarray(x)[:n], result)

    def arguments(self, batch: Any, points: Grid) -> tuple[Any, Grid]:
        """A batch, with as many rows as are compiled, and its grid, on the devices."""
        n = len(jax.tree.leaves(batch)[0])
        fill = np.arange(padded_rows(n, self.devices)) % n
        if len(fill) != n:
            batch = jax.tree.map(lambda x: x[fill], batch)
        batch = jax.device_put(batch, self.rows(len(fill)))
        return batch, jax.device_put(points, self.replicated)


def place(
    pretrained: Pretrained,
    *,
    dtype: DTypeLike | None = None,
    devices: Sequence[Any] | None = None,
) -> Placed:
    """Puts a model on devices, parameters and arithmetic in `dtype`.

    None means bfloat16 on TPU and GPU, float32 on the CPU; and all local devices, on the CPU one,
    for its devices share the same cores.
    """
    dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
    by_row, replicated = shardings(devices)
    params = {name: pretrained.params[name] for name in ("unet", "vae", "text")}
    scheduler = pretrained.scheduler
    return Placed(
        config=pretrained.config,
        networks=networks(pretrained.config, dtype, attend_on(by_row), by_row),
        shapes=shapes(params, dtype, replicated),
        arriving=ThreadPoolExecutor(1).submit(put, params, dtype, replicated),
        tokenizer=pretrained.tokenizer,
        schedule=STABLE_DIFFUSION if scheduler is None else from_diffusers(scheduler),
        scheduler=scheduler,
        dtype=dtype,
        by_row=by_row,
        replicated=replicated,
    )


def rows_per_device(rows: int | None) -> int:
    """How many pictures a device computes at once: `rows`; None: 8, on the CPU 1.

    There a row takes gigabytes at SD's size, and more rows are no faster.
    """
    return rows or (1 if jax.default_backend() == "cpu" else 8)


def padded_rows(n: int, devices: int) -> int:
    """The next power of two of rows a device, or of all rows if every device then has at most one
    of their three guidance branches: few batch sizes are compiled."""
    few = 2 ** (n - 1).bit_length()
    rows = -(-n // devices)
    return few if 3 * few <= devices else devices * 2 ** (rows - 1).bit_length()
