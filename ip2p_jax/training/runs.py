# SPDX-License-Identifier: Apache-2.0
"""Builds what a configuration trains, and writes DIR/base, the frozen parts beside the checkpoints."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from ip2p_jax import config
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.training import logs
from ip2p_jax.training.tasks import Task, latent_std, vae_task
from ip2p_jax.types import Batch, Params
from ip2p_jax.weights import configs
from ip2p_jax.weights.hub import ASSETS
from ip2p_jax.weights.load import open_tokenizer

MEASURED = 64
"""Batches over which the standard deviation of a new VAE's latents is measured."""


class Run(NamedTuple):
    """What to train, the tokenizer of its data, and what is left to do after the last step."""

    task: Task
    tokenizer: Any
    finish: Callable[[Params, Iterator[Batch]], None]


def compute_type(cfg: config.Config) -> Any:
    """The type that networks compute in; parameters, EMA and optimizer are float32 always."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if cfg.dtype == "auto" else cfg.dtype)


def prepare(cfg: config.Config, workdir: str, fresh: bool) -> Run:
    """Builds the run of `cfg`; a fresh one reads its parts from their sources, else from DIR/base."""
    prepare_kind = {"vae": prepare_vae}[cfg.objective.kind]
    return prepare_kind(cfg, workdir, fresh)


def prepare_vae(cfg: config.Config, workdir: str, fresh: bool) -> Run:
    """A VAE from scratch. The instructions of the pairs are not used."""
    sizes = cfg.model.dims
    task = vae_task(
        sizes,
        kl_weight=cfg.objective.kl_weight,
        dtype=compute_type(cfg),
        key=jax.random.key(cfg.seed),
    )
    finish = functools.partial(write_vae_config, workdir, sizes)
    return Run(task, open_tokenizer(ASSETS / "clip_tokenizer"), finish)


def write_vae_config(
    workdir: str, sizes: ModelConfig, ema: Params, batches: Iterator[Batch]
) -> None:
    """Writes DIR/base/vae/config.json with the scaling factor that gives latents of unit variance."""
    std = latent_std(sizes, ema["vae"], [next(batches) for _ in range(MEASURED)])
    cfg = dataclasses.replace(sizes.vae, scaling_factor=round(1 / std, 5))
    logs.write_json(epath.Path(workdir) / "base/vae/config.json", configs.vae_to_json(cfg))
