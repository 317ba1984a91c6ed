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
from jax.sharding import Mesh
from jaxtyping import Array, Key
from transformers import CLIPTokenizer

from ip2p_jax import checks, config
from ip2p_jax.data.buckets import buckets
from ip2p_jax.data.latents import check_encoder, check_settings, made_with
from ip2p_jax.data.loader import (
    CAPTIONED_LATENTS,
    CAPTIONS,
    LATENTS,
    PAIRS,
    Kind,
    Loader,
    make_loader,
)
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.tokens import tokenize
from ip2p_jax.data.transforms import captions_of
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION, from_diffusers
from ip2p_jax.models.flash import attend_on
from ip2p_jax.models.presets import ModelConfig, TextConfig
from ip2p_jax.training import logs, mesh
from ip2p_jax.training.lora import low_rank
from ip2p_jax.training.state import Start, run_keys
from ip2p_jax.training.tasks.clip import clip_task
from ip2p_jax.training.tasks.edit import edit_task
from ip2p_jax.training.tasks.generate import generate_task
from ip2p_jax.training.tasks.task import Task, given, scratch
from ip2p_jax.training.tasks.vae import latent_std, vae_task
from ip2p_jax.types import Batch, Params
from ip2p_jax.weights import configs
from ip2p_jax.weights.clip import PretrainedClip
from ip2p_jax.weights.digest import encoder_digest
from ip2p_jax.weights.hub import ASSETS, copy_tree, fetch
from ip2p_jax.weights.load import (
    PARTS,
    V_PREDICTION,
    ZERO_TERMINAL_SNR,
    Pretrained,
    abstract_part,
    check_fit,
    load,
    load_base,
    load_vae,
    open_tokenizer,
)
from ip2p_jax.weights.names import Names
from ip2p_jax.weights.save import save_clip, save_diffusers, save_vae
from ip2p_jax.weights.widen import widen

MEASURED = 64
"""Batches over which the standard deviation of a new VAE's latents is measured."""

LOOKED_AT = 100
"""Pairs whose captions are looked at before training: data sets mostly have all or none."""


class Run(NamedTuple):
    """What to train, how its batches are opened, and what is left to do after the last step."""

    task: Task
    load: Callable[..., Loader]  # `make_loader` of what the task takes
    finish: Callable[[Params, Iterator[Any]], None]  # takes the EMA and batches on devices


def no_more(ema: Params, batches: Iterator[Any]) -> None:
    """Nothing is left to do."""


def compute_type(cfg: config.Config) -> Any:
    """The type that networks compute in; parameters, EMA and optimizer are float32 always."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(auto if cfg.dtype == "auto" else cfg.dtype)


def prepare(cfg: config.Config, workdir: str, fresh: bool, devices: Mesh) -> Run:
    """Builds the run of `cfg`; what is frozen is read from its source once, then from DIR/base."""
    prepare_kind = {
        "edit": prepare_edit,
        "generate": prepare_generate,
        "vae": prepare_vae,
        "clip": prepare_clip,
    }[cfg.objective.kind]
    return prepare_kind(cfg, workdir, fresh, devices)


def prepare_edit(cfg: config.Config, workdir: str, fresh: bool, devices: Mesh) -> Run:
    """InstructPix2Pix, from a pretrained model or from scratch, on pictures or their latents."""
    task = functools.partial(edit_task, attend=attend_on(mesh.replicated(devices)))
    return prepare_diffusion(cfg, workdir, fresh, as_editor, task, (PAIRS, LATENTS))


def prepare_generate(cfg: config.Config, workdir: str, fresh: bool, devices: Mesh) -> Run:
    """Text-to-image, likewise."""
    kinds = CAPTIONS, CAPTIONED_LATENTS
    check_captions(cfg.data, kinds[is_cached(cfg.data)].source)
    task = functools.partial(generate_task, attend=attend_on(mesh.replicated(devices)))
    return prepare_diffusion(cfg, workdir, fresh, as_generator, task, kinds)


def is_cached(cfg: config.Data) -> bool:
    """Whether the data are latents."""
    return any(made_with(folder) for folder in config.folders(cfg))


def prepare_diffusion(
    cfg: config.Config,
    workdir: str,
    fresh: bool,
    shape: Callable[[Pretrained], Pretrained],
    build: Callable[..., Task],
    kinds: tuple[Kind, Kind],
) -> Run:
    """A task on pictures or, which is the second kind of batches, on their latents."""
    cached = is_cached(cfg.data)
    made = {folder: made_with(folder) for folder in config.folders(cfg.data)} if cached else {}
    check_settings(made, cfg.data)
    build = functools.partial(build, cached=cached)
    task, tokenizer = diffusion_task(cfg, workdir, fresh, shape, build)
    if cached:
        check_encoder(made, encoder_digest(task.frozen["vae"]))
    return Run(task, batches_of(kinds[cached], tokenizer), no_more)


def batches_of(kind: Kind, tokenizer: CLIPTokenizer) -> Callable[..., Loader]:
    """`make_loader` for batches of this kind."""
    return functools.partial(make_loader, tokenizer=tokenizer, kind=kind)


def diffusion_task(
    cfg: config.Config,
    workdir: str,
    fresh: bool,
    shape: Callable[[Pretrained], Pretrained],
    build: Callable[..., Task],
) -> tuple[Task, Any]:
    """A task on the latents of a frozen VAE, and its tokenizer. A fresh run writes DIR/base, from
    which the run goes on; `shape` gives what is opened the input channels of the task."""
    trained, key = trained_parts(cfg), run_keys(cfg.seed)[0]
    p = shape(open_sources(cfg.model)) if fresh else load_base(base_folder(workdir), trained)
    check_resolution(cfg, p.config.multiple)
    frozen = {part: params for part, params in p.params.items() if part not in trained}
    if fresh:
        base = dataclasses.replace(p, params=frozen)
        write_base(workdir, functools.partial(save_diffusers, base))
    task = build(
        p.config,
        start_of(p, trained, fresh, key),
        frozen,
        tokenize(p.tokenizer, [""])[0],
        schedule=STABLE_DIFFUSION if p.scheduler is None else from_diffusers(p.scheduler),
        objective=cfg.objective,
        sample_steps=cfg.log.sample_steps,
        dtype=compute_type(cfg),
        remat=cfg.remat,
    )
    return low_rank(task, cfg.lora, key) if cfg.lora.rank else task, p.tokenizer


def as_editor(p: Pretrained) -> Pretrained:
    """`p` with input channels for the image latent."""
    return widen(p) if "unet" in p.params else dataclasses.replace(p, config=p.config.widened())


def as_generator(p: Pretrained) -> Pretrained:
    """`p`, which is refused if it edits pictures."""
    try:
        checks.generates(p.config)
    except ValueError as error:
        raise ValueError(f"config.model.base: {error}") from None
    return p


def trained_parts(cfg: config.Config) -> tuple[str, ...]:
    """The parts that are trained whole: none where a LoRA is."""
    if cfg.lora.rank:
        return ()
    return ("unet", "text") if cfg.model.train_text else ("unet",)


def check_resolution(cfg: config.Config, multiple: int) -> None:
    """Raises ValueError for pictures that the networks cannot take."""
    name = "buckets" if cfg.data.buckets else "resolution"
    if any(side % multiple for bucket in buckets(cfg.data) for side in bucket):
        raise ValueError(
            f"config.data.{name} is {getattr(cfg.data, name)}, expected a multiple of {multiple} "
            "for this model"
        )


def start_of(p: Pretrained, trained: Sequence[str], fresh: bool, key: Key[Array, ""]) -> Start:
    """Where the trained parts start; a run that goes on needs only their shapes."""
    if not fresh:
        return given({part: abstract_part(part, getattr(p.config, part)) for part in trained})
    if all(part in p.params for part in trained):
        return given({part: p.params[part] for part in trained})
    return scratch(key, **{n: (PARTS[n].network, getattr(p.config, n)) for n in trained})


def open_sources(model: config.Model) -> Pretrained:
    """Opens what `model` names; a start from scratch has only its VAE."""
    p = load(model.base) if model.base else from_dims(model)
    if model.vae:
        sizes, vae = load_vae(model.vae)
        sizes = dataclasses.replace(p.config, vae=sizes)
        p = dataclasses.replace(p, config=sizes, params=p.params | {"vae": vae})
        check_fit(sizes, f"config.model.vae={model.vae}")
    if model.tokenizer:
        p = dataclasses.replace(p, tokenizer=open_tokenizer(Path(model.tokenizer)))
    check_vocabulary(model, p.tokenizer, p.config.text)
    p.tokenizer.model_max_length = p.config.text.positions
    return dataclasses.replace(p, scheduler=own_scheduler(p.scheduler), safety=None)


def check_vocabulary(model: config.Model, tokenizer: CLIPTokenizer, sizes: TextConfig) -> None:
    """Raises ValueError where the tokenizer has more entries than the text tower."""
    if len(tokenizer) > sizes.vocab_size:
        raise ValueError(
            f"config.model.tokenizer={model.tokenizer} has {len(tokenizer)} entries, the text "
            f"tower {sizes.vocab_size}"
        )


def from_dims(model: config.Model) -> Pretrained:
    """A model that has dimensions and a tokenizer, but no parameters."""
    if not (model.vae and model.tokenizer and model.train_text):
        raise ValueError(
            "config.model.base is empty: a start from scratch needs config.model.vae, "
            "config.model.tokenizer and config.model.train_text=True"
        )
    tokenizer = open_tokenizer(Path(model.tokenizer))
    scheduler = V_PREDICTION if model.prediction == "v_prediction" else None
    scheduler = ZERO_TERMINAL_SNR if model.zero_terminal_snr else scheduler
    sizes = dataclasses.replace(model.dims, text=text_for(tokenizer, model.dims.text))
    return Pretrained(sizes, {}, tokenizer, scheduler, Names())


def text_for(tokenizer: CLIPTokenizer, sizes: TextConfig) -> TextConfig:
    """A text tower of these sizes that knows the special tokens of `tokenizer`."""
    return dataclasses.replace(
        sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


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


def write_base(workdir: str, save: Callable[[Path], None]) -> None:
    """Writes DIR/base with `save`; what a run left there before its first step goes."""
    if not logs.writes():
        return
    if "://" not in workdir:
        shutil.rmtree(base_folder(workdir), ignore_errors=True)
        save(base_folder(workdir))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "base")
        copy_tree(epath.Path(folder) / "base", epath.Path(workdir) / "base")


def prepare_vae(cfg: config.Config, workdir: str, fresh: bool, devices: Mesh) -> Run:
    """A VAE from scratch, or a new decoder. The instructions of the pairs are not used."""
    sizes, pretrained, finish = cfg.model.dims, None, no_more
    if cfg.model.vae:
        of_vae, pretrained = load_vae(cfg.model.vae if fresh else str(base_folder(workdir)))
        sizes = dataclasses.replace(sizes, vae=of_vae)
        if fresh:
            save = functools.partial(save_vae, of_vae, pretrained, dtype=jnp.float32)
            write_base(workdir, lambda base: save(base / "vae"))
    else:
        finish = functools.partial(write_vae_config, workdir, sizes)
    check_resolution(cfg, sizes.vae.factor)
    task = vae_task(
        sizes,
        pretrained,
        kl_weight=cfg.objective.kl_weight,
        dtype=compute_type(cfg),
        key=run_keys(cfg.seed)[0],
    )
    return Run(task, batches_of(PAIRS, open_tokenizer(ASSETS / "clip_tokenizer")), finish)


def prepare_clip(cfg: config.Config, workdir: str, fresh: bool, devices: Mesh) -> Run:
    """A CLIP from scratch. A fresh run writes DIR/base, a CLIP's folder without weights."""
    check_captions(cfg.data, PairSource)
    tokenizer, sizes = open_tokenizer(Path(cfg.model.tokenizer)), cfg.model.clip
    sizes = dataclasses.replace(sizes, text=text_for(tokenizer, sizes.text))
    check_vocabulary(cfg.model, tokenizer, sizes.text)
    tokenizer.model_max_length = sizes.text.positions
    if fresh:
        p = PretrainedClip(sizes, {}, tokenizer)
        write_base(workdir, functools.partial(save_clip, p))
    task = clip_task(sizes, dtype=compute_type(cfg), key=run_keys(cfg.seed)[0])
    return Run(task, batches_of(CAPTIONS, tokenizer), no_more)


def check_captions(cfg: config.Data, source: Callable[..., Any]) -> None:
    """Looks at records of the `source` all over; ValueError names the first without a caption."""
    for folder in config.folders(cfg):
        records = source(folder, cfg.split)
        for i in np.unique(np.linspace(0, len(records) - 1, LOOKED_AT, dtype=int)):
            captions_of(records[int(i)])


def write_vae_config(
    workdir: str, sizes: ModelConfig, ema: Params, batches: Iterator[Batch]
) -> None:
    """Writes DIR/base/vae/config.json, with the scaling factor that makes latents of variance 1."""
    std = latent_std(sizes, ema["vae"], batches, MEASURED)
    cfg = dataclasses.replace(sizes.vae, scaling_factor=round(1 / std, 5))
    logs.write_json(epath.Path(workdir) / "base/vae/config.json", configs.vae_to_json(cfg))
