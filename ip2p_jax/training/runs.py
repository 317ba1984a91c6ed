# SPDX-License-Identifier: Apache-2.0
"""Builds what a configuration trains, and writes DIR/base, what is frozen, beside checkpoints."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Key

from ip2p_jax import config
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, from_diffusers
from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.training import logs
from ip2p_jax.training.state import Start, run_keys
from ip2p_jax.training.tasks import Task, edit_task, given, latent_std, scratch, vae_task
from ip2p_jax.types import Batch, Params
from ip2p_jax.weights import configs
from ip2p_jax.weights.hub import ASSETS, copy_tree, fetch
from ip2p_jax.weights.load import (
    PARTS,
    V_PREDICTION,
    Pretrained,
    abstract_part,
    check_fit,
    load,
    load_base,
    load_vae,
    open_tokenizer,
)
from ip2p_jax.weights.names import Names
from ip2p_jax.weights.save import save_diffusers
from ip2p_jax.weights.widen import widen

MEASURED = 64
"""Batches over which the standard deviation of a new VAE's latents is measured."""


class Run(NamedTuple):
    """What to train, the tokenizer of its data, and what is left to do after the last step."""

    task: Task
    tokenizer: Any
    finish: Callable[[Params, Iterator[Batch]], None]  # takes the EMA and batches on devices


def compute_type(cfg: config.Config) -> Any:
    """The type that networks compute in; parameters, EMA and optimizer are float32 always."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if cfg.dtype == "auto" else cfg.dtype)


def prepare(cfg: config.Config, workdir: str, fresh: bool) -> Run:
    """Builds the run of `cfg`; what is frozen is read from its source once, then from DIR/base."""
    prepare_kind = {"edit": prepare_edit, "vae": prepare_vae}[cfg.objective.kind]
    return prepare_kind(cfg, workdir, fresh)


def prepare_edit(cfg: config.Config, workdir: str, fresh: bool) -> Run:
    """InstructPix2Pix, from a pretrained model or from scratch. A fresh run writes DIR/base."""
    trained = ("unet", "text") if cfg.model.train_text else ("unet",)
    p = open_sources(cfg.model) if fresh else load_base(base_folder(workdir), trained)
    check_resolution(cfg, p.config.multiple)
    frozen = {part: params for part, params in p.params.items() if part not in trained}
    if fresh:
        write_base(workdir, dataclasses.replace(p, params=frozen))
    task = edit_task(
        p.config,
        start_of(p, trained, fresh, run_keys(cfg.seed)[0]),
        frozen,
        tokenize(p.tokenizer, [""])[0],
        schedule=STABLE_DIFFUSION if p.scheduler is None else from_diffusers(p.scheduler),
        drop_rate=cfg.objective.drop_rate,
        sample_steps=cfg.log.sample_steps,
        dtype=compute_type(cfg),
    )
    return Run(task, p.tokenizer, lambda ema, batches: None)


def check_resolution(cfg: config.Config, multiple: int) -> None:
    """Raises ValueError for pictures that the networks cannot take."""
    if cfg.data.resolution % multiple:
        raise ValueError(
            f"config.data.resolution is {cfg.data.resolution}, expected a multiple of {multiple} "
            "for this model"
        )


def start_of(p: Pretrained, trained: Sequence[str], fresh: bool, key: Key[Array, ""]) -> Start:
    """Where the trained parts start; a run that goes on needs only their shapes."""
    if not fresh:
        return given({part: abstract_part(part, getattr(p.config, part)) for part in trained})
    if trained[0] in p.params:
        return given({part: p.params[part] for part in trained})
    return scratch(key, **{n: (PARTS[n].network, getattr(p.config, n)) for n in trained})


def open_sources(model: config.Model) -> Pretrained:
    """Opens what `model` names, as an editing model; a start from scratch has only its VAE."""
    p = load(model.base) if model.base else from_dims(model)
    if model.vae:
        sizes, vae = load_vae(model.vae)
        sizes = dataclasses.replace(p.config, vae=sizes)
        p = dataclasses.replace(p, config=sizes, params=p.params | {"vae": vae})
        check_fit(sizes, f"config.model.vae={model.vae}")
    if model.tokenizer:
        p = dataclasses.replace(p, tokenizer=open_tokenizer(Path(model.tokenizer)))
    if len(p.tokenizer) > p.config.text.vocab_size:
        raise ValueError(
            f"config.model.tokenizer={model.tokenizer} has {len(p.tokenizer)} entries, the text "
            f"tower {p.config.text.vocab_size}"
        )
    p.tokenizer.model_max_length = p.config.text.positions
    p = dataclasses.replace(p, scheduler=own_scheduler(p.scheduler), safety=None)
    return widen(p) if model.base else dataclasses.replace(p, config=p.config.widened())


def from_dims(model: config.Model) -> Pretrained:
    """A model that has dimensions and a tokenizer, but no parameters."""
    if not (model.vae and model.tokenizer and model.train_text):
        raise ValueError(
            "config.model.base is empty: a start from scratch needs config.model.vae, "
            "config.model.tokenizer and config.model.train_text=True"
        )
    tokenizer = open_tokenizer(Path(model.tokenizer))
    text = dataclasses.replace(
        model.dims.text,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scheduler = V_PREDICTION if model.prediction == "v_prediction" else None
    sizes = dataclasses.replace(model.dims, text=text)
    return Pretrained(sizes, {}, tokenizer, scheduler, Names())


def own_scheduler(scheduler: dict | None) -> dict | None:
    """None, k-diffusion's conventions, where `scheduler` has the noise levels of SD 1."""
    if scheduler is None:
        return None
    theirs = from_diffusers(scheduler)
    same = np.array_equal(theirs.alpha_bar, STABLE_DIFFUSION.alpha_bar)
    return None if same and theirs.prediction == STABLE_DIFFUSION.prediction else scheduler


def base_folder(workdir: str) -> Path:
    """DIR/base on this machine."""
    return fetch(epath.Path(workdir)) if "://" in workdir else Path(workdir) / "base"


def write_base(workdir: str, p: Pretrained) -> None:
    """Writes DIR/base, a diffusers folder; what a run left there before its first step goes."""
    if not logs.writes():
        return
    if "://" not in workdir:
        shutil.rmtree(base_folder(workdir), ignore_errors=True)
        save_diffusers(p, base_folder(workdir))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(p, Path(folder) / "base")
        copy_tree(epath.Path(folder) / "base", epath.Path(workdir) / "base")


def prepare_vae(cfg: config.Config, workdir: str, fresh: bool) -> Run:
    """A VAE from scratch. The instructions of the pairs are not used."""
    sizes = cfg.model.dims
    check_resolution(cfg, sizes.vae.factor)
    task = vae_task(
        sizes,
        kl_weight=cfg.objective.kl_weight,
        dtype=compute_type(cfg),
        key=run_keys(cfg.seed)[0],
    )
    finish = functools.partial(write_vae_config, workdir, sizes)
    return Run(task, open_tokenizer(ASSETS / "clip_tokenizer"), finish)


def write_vae_config(
    workdir: str, sizes: ModelConfig, ema: Params, batches: Iterator[Batch]
) -> None:
    """Writes DIR/base/vae/config.json, with the scaling factor that makes latents of variance 1."""
    std = latent_std(sizes, ema["vae"], [next(batches) for _ in range(MEASURED)])
    cfg = dataclasses.replace(sizes.vae, scaling_factor=round(1 / std, 5))
    logs.write_json(epath.Path(workdir) / "base/vae/config.json", configs.vae_to_json(cfg))
