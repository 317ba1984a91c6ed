# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a diffusers folder or an LDM single file, a CLIP as transformers' folder, a VAE
alone as diffusers'.

Whole, or not at all.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import CLIPTokenizer

from ip2p_jax.data.files import atomic_folder
from ip2p_jax.models.clip import MEAN, STD
from ip2p_jax.models.presets import TextConfig, VAEConfig
from ip2p_jax.types import Params
from ip2p_jax.weights import configs, ldm, tensor_file
from ip2p_jax.weights.clip import PretrainedClip
from ip2p_jax.weights.hub import WEIGHTS, file_names
from ip2p_jax.weights.load import EPSILON, LDM_METADATA, PARTS, Pretrained
from ip2p_jax.weights.names import CLIP_VISION, buffers, diffusers_spelling, rename
from ip2p_jax.weights.port import leaves, to_torch

Progress = Callable[[int], object]
"""Called with a number of bytes each time so many have been written."""


def size(p: Pretrained, dtype: DTypeLike) -> int:
    """Bytes of the parameters in `dtype`: what an export writes, but for headers."""
    return sum(x.size for _, x in leaves(p.params)) * jnp.dtype(dtype).itemsize


def save_diffusers(
    p: Pretrained,
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Progress = lambda count: None,
) -> None:
    """Writes a folder that diffusers' pipelines open; tensors are called as in the source of `p`.

    Parts that `p.params` lacks get their `config.json` only.

    Raises:
      ValueError: `path` exists and is not empty, or a value does not fit into `dtype`.
    """
    with atomic_folder(path) as part:
        for name, (folder, _, _, to_json) in PARTS.items():
            sizes = getattr(p.config, name)
            write_json(part / folder / "config.json", to_json(sizes))
            if name in p.params:
                tensors = to_torch(p.params[name], diffusers_spelling(name, p.names))
                tensors |= buffers(name, sizes, p.names)
                file = part / folder / file_names(WEIGHTS[folder], None)[0]
                tensor_file.write(file, tensors, jnp.dtype(dtype), {}, progress)
        save_tokenizer(p.tokenizer, part / "tokenizer")
        scheduler = p.scheduler or EPSILON
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        if p.safety is not None:
            for folder in (p.safety, p.safety.with_name("feature_extractor")):
                shutil.copytree(folder, part / folder.name)
        write_json(part / "model_index.json", model_index(p, scheduler["_class_name"]))


def save_ldm(
    p: Pretrained,
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Progress = lambda count: None,
) -> None:
    """Writes one `.safetensors` in LDM naming; the safety checker has no place in it.

    Its metadata holds the dimensions, the scheduler and a vocabulary that is not CLIP's.

    Raises:
      ValueError: `path` is not called .safetensors, exists, or a value does not fit into `dtype`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if path.exists():
        raise ValueError(f"{path} is already there")
    tensors = {}
    for name, params in p.params.items():
        of_part = to_torch(params, ldm.spelling(name, p.config))
        tensors |= ldm.layout(name, p.config, of_part, p.names.position_ids)
    described: dict[str, Any] = {
        name: part.to_json(getattr(p.config, name)) for name, part in PARTS.items()
    }
    described |= {"scheduler": p.scheduler, "tokenizer": own_vocabulary(p)}
    metadata = {LDM_METADATA: json.dumps(described)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_file.write(path, tensors, jnp.dtype(dtype), metadata, progress)


def save_vae(cfg: VAEConfig, params: Params, path: str | Path, *, dtype: DTypeLike) -> None:
    """Writes a folder that diffusers' `AutoencoderKL` opens. Raises as `save_diffusers`."""
    with atomic_folder(path) as part:
        write_json(part / "config.json", configs.vae_to_json(cfg))
        file = part / file_names(WEIGHTS["vae"], None)[0]
        tensor_file.write(file, to_torch(params), jnp.dtype(dtype), {}, lambda count: None)


def save_clip(
    p: PretrainedClip,
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: Progress = lambda count: None,
) -> None:
    """Writes a folder that transformers' `CLIPModel` and `CLIPProcessor` open.

    Without parameters in `p` there are no weights in it. Raises as `save_diffusers`.
    """
    with atomic_folder(path) as part:
        write_json(part / "config.json", configs.clip_to_json(p.config))
        write_json(part / "preprocessor_config.json", preprocessor(p.config.vision.image_size))
        save_tokenizer(p.tokenizer, part)
        if p.params:
            tensors = to_torch(p.params, lambda name: rename(name, CLIP_VISION))
            tensor_file.write(part / "model.safetensors", tensors, jnp.dtype(dtype), {}, progress)


def preprocessor(size: int) -> dict:
    """How transformers prepares pictures for a CLIP: shorter side to `size`, cut to a square."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": size},
    }


def save_tokenizer(tokenizer: CLIPTokenizer, path: Path) -> None:
    """Writes a tokenizer as today's libraries do (tokenizer.json), and as it was released."""
    tokenizer.save_pretrained(path)
    tokenizer.backend_tokenizer.model.save(str(path))


def own_vocabulary(p: Pretrained) -> dict | None:
    """The tokenizer of a model whose vocabulary is not CLIP's."""
    if p.config.text.vocab_size == TextConfig.vocab_size:
        return None
    model = json.loads(p.tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "vocab": model["vocab"],
        "merges": model["merges"],
        "pad_token": str(p.tokenizer.pad_token),
    }


def write_json(path: Path, content: dict) -> None:
    """Writes JSON as diffusers does, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def model_index(p: Pretrained, scheduler: str) -> dict:
    """diffusers' table of contents."""
    edits = p.config.unet.in_channels == 2 * p.config.vae.latent_channels
    checked = p.safety is not None
    return {
        "_class_name": f"StableDiffusion{'InstructPix2Pix' if edits else ''}Pipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if checked else [None, None],
        "requires_safety_checker": checked,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]
        if checked
        else [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
