# SPDX-License-Identifier: Apache-2.0
"""Opens a DINO: transformers' folder or hub id, or a file in the names of DINO's own code.

DINO's files state no dimensions: they are read off the tensors' shapes, and what shapes do not show
is DINO's (heads of width 64, exact GELU, norms with epsilon 1e-6).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np

from ip2p_jax.models.dino import DINO
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import DINOConfig
from ip2p_jax.types import Params
from ip2p_jax.weights import configs, hub
from ip2p_jax.weights.clip import read_folder
from ip2p_jax.weights.ldm import HEAD_WIDTH, count_up
from ip2p_jax.weights.load import read_json, read_tensors
from ip2p_jax.weights.names import Table, rename, under
from ip2p_jax.weights.port import from_torch

FIXED = {"model_type": "vit", "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True}
READ = {
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
BLOCK = [
    ("layer_norm1.", "norm1."),
    ("self_attn.q_proj.", "attn.q."),
    ("self_attn.k_proj.", "attn.k."),
    ("self_attn.v_proj.", "attn.v."),
    ("self_attn.out_proj.", "attn.proj."),
    ("layer_norm2.", "norm2."),
    ("mlp.", "mlp."),
]
TRANSFORMERS_LAYER = [
    ("layer_norm1.", "layernorm_before."),
    ("self_attn.q_proj.", "attention.attention.query."),
    ("self_attn.k_proj.", "attention.attention.key."),
    ("self_attn.v_proj.", "attention.attention.value."),
    ("self_attn.out_proj.", "attention.output.dense."),
    ("layer_norm2.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
]
LEADING = {"cls_token": 2, "pos_embed": 1, "position_embeddings": 1}
"""How many axes of length 1 files have in front of ours, by the last part of the name."""


@dataclass(frozen=True)
class PretrainedDino:
    """A DINO in memory: dimensions, and the float32 parameters of `models.dino.DINO`."""

    config: DINOConfig
    params: Params


def load_dino(model: str, revision: str | None = None) -> PretrainedDino:
    """Opens `model`: a folder of transformers' `ViTModel`, a hub id of one (facebook/dino-vits16),
    or a backbone in DINO's own names (`dino_deitsmall16_pretrain.pth`, or `.safetensors`).

    revision: branch, tag or commit of a hub id.

    Raises:
      FileNotFoundError, ValueError: one line that names the file or tensor and what was expected.
    """
    path = hub.locate_clip(model, revision)
    return load_folder(path) if path.is_dir() else load_original(path)


def load_folder(path: Path) -> PretrainedDino:
    """Opens a folder of transformers, whose pooler DINO does not have: it is left out."""
    file = path / "config.json"
    config = config_from_json(read_json(file), str(file))
    tensors, source = read_folder(path)
    tensors = {name: x for name, x in tensors.items() if not name.startswith("pooler.")}
    table = [
        ("embeddings.class_embedding", "embeddings.cls_token"),
        ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
        ("embeddings.position_embedding.weight", "embeddings.position_embeddings"),
    ]
    for i in range(config.layers):
        table += under(f"encoder.layers.{i}.", f"encoder.layer.{i}.", TRANSFORMERS_LAYER)
    return fill(config, tensors, source, table)


def load_original(path: Path) -> PretrainedDino:
    """Opens a file in the names of DINO's own code."""
    tensors = unfuse(read_tensors(path)[0])
    config = config_from_shapes({name: x.shape for name, x in tensors.items()}, str(path))
    table = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("layernorm.", "norm."),
    ]
    for i in range(config.layers):
        table += under(f"encoder.layers.{i}.", f"blocks.{i}.", BLOCK)
    return fill(config, tensors, str(path), table)


def fill(
    config: DINOConfig, tensors: Mapping[str, np.ndarray], source: str, table: Table
) -> PretrainedDino:
    """The parameters from tensors whose names the table spells."""
    _, params = abstract(DINO, config)
    trimmed = {name: trim(name, x) for name, x in tensors.items()}
    return PretrainedDino(
        config, from_torch(params, trimmed, source, lambda name: rename(name, table))
    )


def trim(name: str, x: np.ndarray) -> np.ndarray:
    """Leaves out the axes of length 1 in front of tokens and positions."""
    n = LEADING.get(name.rpartition(".")[2], 0)
    return x.reshape(x.shape[n:]) if x.shape[:n] == (1,) * n else x


def unfuse(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the fused projections of q, k and v apart."""
    apart = dict(tensors)
    for name, fused in tensors.items():
        if ".attn.qkv." in name and fused.ndim and len(fused) % 3 == 0:
            for letter, x in zip("qkv", np.split(apart.pop(name), 3), strict=True):
                apart[name.replace(".qkv.", f".{letter}.")] = x
    return apart


def config_from_json(config: configs.Json, source: str) -> DINOConfig:
    """Reads transformers' `ViTConfig`, whose generic keys are inert.

    Raises:
      ValueError: names `source` and what is not supported.
    """
    got = configs.read(config, source, READ, FIXED)
    return DINOConfig(
        image_size=configs.single(got["image_size"], 2, source, "image_size"),
        patch_size=configs.single(got["patch_size"], 2, source, "patch_size"),
        width=got["hidden_size"],
        layers=got["num_hidden_layers"],
        heads=got["num_attention_heads"],
        mlp_width=got["intermediate_size"],
        norm_eps=got["layer_norm_eps"],
    )


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], source: str) -> DINOConfig:
    """Reads the dimensions off the shapes of a file in DINO's names.

    Raises:
      ValueError: names `source` and a tensor that is missing or of another number of dimensions.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(
                f"{source}: no tensor {name}, so not a backbone in DINO's names (of a model in "
                "transformers' names give the folder)"
            )
        if len(shapes[name]) != rank:
            raise ValueError(f"{source}: {name} {shapes[name]}, expected {rank} dimensions")
        return shapes[name]

    width, _, patch, _ = shape("patch_embed.proj.weight", 4)
    if width % HEAD_WIDTH:
        raise ValueError(
            f"{source}: patch_embed.proj.weight is {width} wide, expected a multiple of 64"
        )
    return DINOConfig(
        image_size=patch * isqrt(max(0, shape("pos_embed", 3)[1] - 1)),
        patch_size=patch,
        width=width,
        layers=count_up(shapes, "blocks.{}.norm1.weight"),
        heads=width // HEAD_WIDTH,
        mlp_width=shape("blocks.0.mlp.fc1.weight", 2)[0],
    )
