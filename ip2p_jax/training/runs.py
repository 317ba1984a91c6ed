# SPDX-License-Identifier: Apache-2.0
"""Builds what a configuration trains, and reads and writes the frozen parts beside the checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp

from ip2p_jax import config
from ip2p_jax.training.tasks import Task, vae_task


def compute_type(cfg: config.Config) -> Any:
    """The type that networks compute in; parameters, EMA and optimizer are float32 always."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if cfg.dtype == "auto" else cfg.dtype)


def prepare(cfg: config.Config, workdir: str, fresh: bool) -> tuple[Task, Any]:
    """Returns the task of a run and the tokenizer of its data."""
    dtype, key = compute_type(cfg), jax.random.key(cfg.seed)
    if cfg.objective.kind == "vae":
        task = vae_task(cfg.model.dims, kl_weight=cfg.objective.kl_weight, dtype=dtype, key=key)
        from transformers import CLIPTokenizer
        from pathlib import Path
        return task, CLIPTokenizer.from_pretrained(Path(__file__).parents[1]/"assets/clip_tokenizer", model_max_length=77)
    raise ValueError("edit: later")
