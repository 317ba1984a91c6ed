# SPDX-License-Identifier: Apache-2.0
"""Opens a model, whatever it is: diffusers folder, hub id, LDM file, run directory, embedded name.

Arrays are views of mapped files wherever a file holds float32, so opening costs seconds and the
memory of what is converted.
"""

import functools
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from transformers import CLIPTokenizer

from ip2p_jax import digests
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import ModelConfig, TextConfig, VAEConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.types import Params
from ip2p_jax.weights import ckpt, configs, ldm, tensor_file
from ip2p_jax.weights.hub import ASSETS, WEIGHTS, file_names, locate, patterns, vae_patterns
from ip2p_jax.weights.lora import Adapter, add
from ip2p_jax.weights.names import POSITION_IDS, Names, detect, diffusers_spelling
from ip2p_jax.weights.port import fault, from_torch, to_torch

LDM_METADATA = "ip2p_jax"
"""Key of an LDM file's metadata under which we keep what such files cannot say."""

EPSILON = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "linspace",
}
"""What SD 1's `scheduler_config.json` says, with the authors' sampler."""

V_PREDICTION = {**EPSILON, "prediction_type": "v_prediction"}
"""What an LDM file of SD 2 needs: SD 2 predicts v."""

ZERO_TERMINAL_SNR = {
    **V_PREDICTION,
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}
"""What a model needs whose noise has no signal left in the end (Lin et al. 2024)."""


class Part(NamedTuple):
    """One of the networks: its folder, and how its configuration is read and written."""

    folder: str
    network: type
    from_json: Callable[[configs.Json, str], Any]
    to_json: Callable[[Any], configs.Json]


PARTS = {
    "unet": Part("unet", UNet, configs.unet_from_json, configs.unet_to_json),
    "vae": Part("vae", VAE, configs.vae_from_json, configs.vae_to_json),
    "text": Part("text_encoder", CLIPText, configs.text_from_json, configs.text_to_json),
}


@dataclass(frozen=True)
class Pretrained:
    """A model in memory: dimensions, float32 parameters by part, and what goes with them."""

    config: ModelConfig
    params: dict[str, Params]
    tokenizer: CLIPTokenizer
    scheduler: dict | None  # scheduler_config.json; None: k-diffusion's conventions
    names: Names
    safety: Path | None = None  # safety_checker folder, its feature_extractor beside it


def load(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    safety: bool = False,
    vae: str | None = None,
    lora: Sequence[str] = (),
) -> Pretrained:
    """Opens `model`: a hub id, a diffusers folder, one `.safetensors` or `.ckpt` in LDM naming, a
    run directory of ours, or the name of an embedded model.

    revision: branch, tag or commit of a hub id. variant: of a folder's or hub id's files, e.g.
    "fp16". safety: whether the safety checker of a hub id is wanted too (1.2 GB). vae: what
    `load_vae` takes; its VAE takes the place of the model's own. lora: adapters to merge, each as
    FILE or FILE:SCALE (`lora.add`).

    Raises:
      FileNotFoundError, ValueError: one line that names the file or tensor and what was expected.
    """
    if lora:
        p = load(model, revision=revision, variant=variant, safety=safety, vae=vae)
        return replace(p, params=functools.reduce(add, lora, p.params))
    if vae is not None:
        return with_vae(load(model, revision=revision, variant=variant, safety=safety), vae)
    path = locate(model, revision, patterns(variant, safety))
    if path.is_file():
        return load_ldm(path)
    if "://" in model:
        return load_run(epath.Path(model), path)
    if (path / "base").is_dir():
        return load_run(epath.Path(path), path / "base")
    return load_folder(path, variant)


def load_run(run: epath.Path, base: Path) -> Pretrained:
    """Opens a run directory of ours: what `base` holds, and the EMA of what was trained."""
    ema = restore_ema(run)
    pairs = ema.pop("lora", None)
    p = load_base(base, tuple(ema))
    params = {
        part: from_torch(
            abstract_part(part, getattr(p.config, part)), to_torch(x), f"{run}: EMA of the {part}"
        )
        for part, x in ema.items()
    }
    if pairs is not None:
        params["unet"] = read_adapter(run, pairs).on(p.params["unet"], f"{run}: EMA of the LoRA")
    return replace(p, params=p.params | params)


def load_adapter(model: str) -> Adapter:
    """The LoRA that a run directory trained: the EMA of its latest step. Raises as `load`."""
    ema = restore_ema(epath.Path(model))
    if "lora" not in ema:
        raise ValueError(f"{model}: expected a run that trained a LoRA (config.lora.rank)")
    return read_adapter(epath.Path(model), ema["lora"])


def read_adapter(run: epath.Path, pairs: Params) -> Adapter:
    """These pairs of a run, with the alpha that its configuration states."""
    return Adapter(to_torch(pairs), json.loads((run / "config.json").read_text())["lora"]["alpha"])


def load_base(base: Path, trained: Collection[str]) -> Pretrained:
    """Opens DIR/base of a run: parameters of what is frozen, dimensions of what is trained too.

    Where the scheduler is the usual one, which a diffusers folder has to state, k-diffusion's
    conventions hold, as in the run itself.
    """
    p = load_folder(base, without=trained)
    return replace(p, scheduler=None if p.scheduler == EPSILON else p.scheduler)


def load_vae(model: str) -> tuple[VAEConfig, Params]:
    """Opens only the VAE of `model`: of what `load` takes, of a run that trained a VAE, or of the
    folder, hub id or LDM file of a VAE alone. Raises as `load`."""
    path = locate(model, None, vae_patterns())
    if path.is_file():
        return load_ldm_vae(path)
    if (path / "checkpoints").is_dir() and not (path / "base").is_dir():
        raise FileNotFoundError(
            f"{model}: a training run that has not finished (no base/vae/config.json inside, which "
            "its last step writes); run it to its end first"
        )
    is_run = "://" in model or (path / "base").is_dir()
    ema = restore_ema(epath.Path(model)) if is_run else {}
    folder = vae_folder(path / "base" if (path / "base").is_dir() else path)
    cfg = configs.vae_from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    shapes, trained = abstract_part("vae", cfg), ema.get("vae", {})
    params = from_torch(
        {name: shapes[name] for name in trained if name in shapes},
        to_torch(trained),
        f"{model}: EMA of the vae",
    )
    if len(params) < len(shapes):  # all, or but for the decoder
        tensors, source = read_weights(folder, WEIGHTS["vae"])
        params = port_part("vae", cfg, tensors, detect({"vae": tensors}), source) | params
    return cfg, params


def vae_folder(path: Path) -> Path:
    """Where in a folder the VAE is: under vae/, or the folder is that of a VAE alone."""
    if (path / "vae").is_dir():
        return path / "vae"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no VAE (neither vae/ nor a VAE's config.json inside)")
    return path


def load_ldm_vae(path: Path) -> tuple[VAEConfig, Params]:
    """Opens the VAE of a file in LDM naming, that of a whole model or of a VAE alone."""
    tensors, metadata = read_tensors(path)
    if not any(name.startswith(ldm.VAE) for name in tensors):
        tensors = {ldm.VAE + name: x for name, x in tensors.items()}
    kept = {name: x for name, x in ldm.weights(tensors).items() if name.startswith(ldm.VAE)}
    ours = read_metadata(metadata, str(path))
    if ours:
        cfg = configs.vae_from_json(ours["vae"], f"{path}: metadata")
    else:
        cfg = ldm.read_vae_config(kept, str(path))
    spell = ldm.spelling("vae", ModelConfig(vae=cfg))
    return cfg, from_torch(abstract_part("vae", cfg), kept, str(path), spell)


def with_vae(p: Pretrained, vae: str) -> Pretrained:
    """`p` with the VAE of `vae` in the place of its own; ValueError if the UNet does not fit it."""
    sizes, params = load_vae(vae)
    config = replace(p.config, vae=sizes)
    check_fit(config, vae)
    return replace(p, config=config, params=p.params | {"vae": params})


def load_folder(
    path: Path, variant: str | None = None, *, without: Collection[str] = ()
) -> Pretrained:
    """Opens a diffusers folder; of the parts in `without` only the configuration."""
    for part in PARTS.values():
        if not (path / part.folder).is_dir():
            raise FileNotFoundError(f"{path}: not a diffusers folder (no {part.folder}/ inside)")
    cfg = ModelConfig(*(part_config(path, part) for part in PARTS))
    read = {part: read_part(path, part, variant) for part in PARTS if part not in without}
    names = detect({part: tensors for part, (tensors, _) in read.items()})
    params = {
        part: port_part(part, getattr(cfg, part), tensors, names, source)
        for part, (tensors, source) in read.items()
    }
    check_fit(cfg, str(path))
    scheduler = path / "scheduler" / "scheduler_config.json"
    safety = path / "safety_checker"
    return Pretrained(
        cfg,
        params,
        open_tokenizer(path / "tokenizer"),
        read_json(scheduler) if scheduler.is_file() else None,
        names,
        safety if safety.is_dir() else None,
    )


def part_config(path: Path, part: str) -> Any:
    """Reads a part's dimensions from its `config.json`."""
    file = path / PARTS[part].folder / "config.json"
    return PARTS[part].from_json(read_json(file), str(file))


def read_json(path: Path) -> dict:
    """Reads an object of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def read_part(path: Path, part: str, variant: str | None) -> tuple[dict[str, np.ndarray], str]:
    """Reads a part's tensors; also names the source."""
    folder = path / PARTS[part].folder
    return read_weights(folder, WEIGHTS[folder.name], variant)


def read_weights(
    folder: Path, stem: str, variant: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Reads a folder's tensors, from one file or the shards of an index; also names the source."""
    single, index = (folder / n for n in file_names(stem, variant))
    if single.is_file():
        return tensor_file.read(single)[0], str(single)
    if not index.is_file():
        there = sorted(x.name for x in folder.glob("*.safetensors*"))
        raise FileNotFoundError(
            f"{single}: no such file; {folder.name}/ holds {', '.join(there) or 'no safetensors'}"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
        raise ValueError(f"{index}: expected a weight_map of tensors to files beside it")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard}: no such file, but {index.name} names it")
        tensors |= tensor_file.read(folder / shard)[0]
    return tensors, str(index)


@functools.cache
def abstract_part(part: str, cfg: Any) -> Params:
    """The shapes of a part's parameters."""
    return abstract(PARTS[part].network, cfg)[1]


def port_part(
    part: str, cfg: Any, tensors: dict[str, np.ndarray], names: Names, source: str
) -> Params:
    """Fills a part with the tensors of a diffusers folder."""
    kept = {name: x for name, x in tensors.items() if not name.endswith(POSITION_IDS)}
    return from_torch(abstract_part(part, cfg), kept, source, diffusers_spelling(part, names))


def check_fit(cfg: ModelConfig, source: str) -> None:
    """Refuses parts that do not belong together, by the tensors that meet."""
    z, made = cfg.vae.latent_channels, cfg.unet.out_channels
    if z != made:
        raise ValueError(
            f"{source}: the UNet's conv_out.weight {(made, cfg.unet.channels[0], 3, 3)} makes "
            f"{made} channels, the VAE's post_quant_conv.weight {(z, z, 1, 1)} takes {z}"
        )
    if cfg.text.width != cfg.unet.context_dim:
        raise ValueError(
            f"{source}: the text tower's final_layer_norm.weight {(cfg.text.width,)} makes "
            f"{cfg.text.width} channels, the UNet's attn2.to_k.weight takes {cfg.unet.context_dim}"
        )


def open_tokenizer(path: Path) -> CLIPTokenizer:
    """Opens `tokenizer.json` or `vocab.json` + `merges.txt`, with the padding its files state."""
    if not any((path / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(f"{path}: no tokenizer (vocab.json + merges.txt or tokenizer.json)")
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def load_ldm(path: Path) -> Pretrained:
    """Opens a single file in LDM naming."""
    tensors, metadata = read_tensors(path)
    ours = read_metadata(metadata, str(path))
    if ours:
        read = (PARTS[part].from_json(ours[part], f"{path}: metadata") for part in PARTS)
        cfg = ModelConfig(*read)
    else:
        cfg = ldm.read_config(tensors, str(path))
    kept = ldm.weights(tensors)
    params = {}
    for part in PARTS:
        spell, places = ldm.spelling(part, cfg, kept), ldm.prefixes(part)
        of_part = {name: x for name, x in kept.items() if name.startswith(places)}
        shapes = abstract_part(part, getattr(cfg, part))
        params[part] = from_torch(shapes, of_part, str(path), spell)
        kept = {name: x for name, x in kept.items() if name not in of_part}
    if kept:
        raise ValueError(f"{path}: {fault('unexpected', list(kept))}")
    check_fit(cfg, str(path))
    return Pretrained(
        cfg,
        params,
        ldm_tokenizer(cfg.text, ours.get("tokenizer"), str(path)),
        ours["scheduler"] if ours else V_PREDICTION if ldm.is_open_clip(cfg.text) else None,
        Names(position_ids=any(name.endswith(POSITION_IDS) for name in tensors)),
    )


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads (tensors, metadata) of a `.safetensors` file, or of anything else as a `.ckpt`."""
    if path.suffix == ".safetensors":
        return tensor_file.read(path)
    return ckpt.read(path), {}


def read_metadata(metadata: dict[str, str], source: str) -> dict:
    """What our own exports say of themselves; empty for other files."""
    if LDM_METADATA not in metadata:
        return {}
    try:
        ours = json.loads(metadata[LDM_METADATA])
    except ValueError as error:
        raise ValueError(f"{source}: metadata {LDM_METADATA} is not JSON ({error})") from error
    if not isinstance(ours, dict) or not {*PARTS, "scheduler", "tokenizer"} <= ours.keys():
        raise ValueError(f"{source}: metadata {LDM_METADATA} is not complete")
    return ours


def ldm_tokenizer(cfg: TextConfig, own: dict | None, source: str) -> CLIPTokenizer:
    """CLIP's tokenizer, padded with the end token (SD 1) or id 0 (SD 2); or the file's own."""
    if own is not None:
        merges: Any = [tuple(pair) for pair in own["merges"]]
        pad, length = own["pad_token"], cfg.positions
        return CLIPTokenizer(own["vocab"], merges, pad_token=pad, model_max_length=length)
    if cfg.vocab_size != TextConfig.vocab_size:
        raise ValueError(
            f"{source}: a vocabulary of {cfg.vocab_size} entries is not CLIP's "
            f"{TextConfig.vocab_size}, and it brings none"
        )
    pad = "!" if ldm.is_open_clip(cfg) else "<|endoftext|>"
    return CLIPTokenizer.from_pretrained(
        ASSETS / "clip_tokenizer", pad_token=pad, model_max_length=cfg.positions
    )


def restore_ema(run: epath.Path) -> dict[str, Params]:
    """Restores the EMA of a run's newest step that is whole, as numpy arrays on any machine.

    List indices come back as strings; `to_torch` and `from_torch` put that right and check shapes.
    """
    import orbax.checkpoint as ocp  # a third of a second, which other models do without

    root = digests.directory(str(run))
    step, faults = digests.newest(root, ["ema"])
    for damaged, why in faults.items():
        print(f"{run}: step {damaged} is damaged ({why}), not used", file=sys.stderr)
    item = root / str(step) / "ema"
    handler = ocp.StandardCheckpointHandler()  # a checkpointer would look for a step's metadata
    stored = handler.metadata(item).tree
    target = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), stored)
    restored = handler.restore(item, args=ocp.args.StandardRestore(target))
    handler.close()
    return restored
