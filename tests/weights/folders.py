# SPDX-License-Identifier: Apache-2.0
"""Helpers on diffusers folders: their tensors, and other spellings of the same model."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ip2p_jax.models.presets import ModelConfig
from ip2p_jax.weights import ldm
from ip2p_jax.weights.load import part_config

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text": "text_encoder/model.safetensors",
}
OLD_ATTENTION = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a folder by part, read by the safetensors library."""
    return {part: load_file(folder / file) for part, file in FILES.items()}


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts have the same names, shapes and values, bit for bit."""
    return a.keys() == b.keys() and all(
        np.shape(a[k]) == np.shape(b[k]) and np.array_equal(a[k], b[k]) for k in a
    )


def released_names(folder: Path, target: Path) -> Path:
    """Copies a folder, spelling its tensors as the released files do."""
    shutil.copytree(folder, target)
    text = load_file(folder / FILES["text"])
    text = {"text_model." + name.removeprefix("text_model."): x for name, x in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, target / FILES["text"], {"format": "pt"})
    vae = {}
    for name, x in load_file(folder / FILES["vae"]).items():
        if ".attentions." in name:
            for today, old in OLD_ATTENTION.items():
                name = name.replace(today, old)
        vae[name] = x
    save_file(vae, target / FILES["vae"], {"format": "pt"})
    return target


def ldm_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder as the original code's checkpoints have them."""
    config = ModelConfig(*(part_config(folder, part) for part in FILES))
    state = {}
    for part, of_part in tensors(folder).items():
        spell = ldm.spelling(part, config)
        named = {spell(n.removeprefix("text_model.")): x.numpy() for n, x in of_part.items()}
        state |= ldm.layout(part, config, named, True)
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
