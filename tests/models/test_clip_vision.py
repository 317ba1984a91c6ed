# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision tower equals transformers' on torch, and has its tensors in the released shapes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ip2p_jax.models.clip import CLIPVision
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import VisionConfig
from ip2p_jax.weights.configs import vision_from_json
from ip2p_jax.weights.port import from_torch, leaves, torch_name, torch_shape
from tests.oracles import randomize

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
TINY: dict[str, Any] = dict(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    projection_dim=24,
)
RELEASED: dict[str, dict[str, Any]] = {
    "ViT-L/14": dict(
        patch_size=14,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        projection_dim=768,
    ),
    "ViT-B/16": dict(patch_size=16),
    "ViT-B/32": dict(patch_size=32),
}


def ours(theirs: CLIPVisionConfig) -> VisionConfig:
    """Our configuration of a tower, read as from a folder."""
    config = {"vision_config": theirs.to_dict(), "projection_dim": theirs.projection_dim}
    return vision_from_json(config, "config.json")


def plain(name: str) -> str:
    return name.removeprefix("vision_model.")


def embed(cfg: VisionConfig, module: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    graphdef, params = abstract(CLIPVision, cfg)
    tensors = {plain(name): x.numpy() for name, x in module.state_dict().items()}
    params = from_torch(params, tensors)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, pixels))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def check_embeddings(theirs: CLIPVisionConfig, rows: int) -> None:
    """Image embeddings agree; with the other activation, or pictures on their side, they do not."""
    module = randomize(CLIPVisionModelWithProjection(theirs), 3)
    size: Any = (rows, theirs.image_size, theirs.image_size, 3)
    pixels = np.random.default_rng(3).standard_normal(size, np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds.numpy()
    cfg = ours(theirs)
    assert cfg.activation == theirs.hidden_act
    assert error(embed(cfg, module, pixels), expected) < TOLERANCE
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[cfg.activation]
    assert error(embed(replace(cfg, activation=other), module, pixels), expected) > TOLERANCE
    assert error(embed(cfg, module, pixels.swapaxes(1, 2).copy()), expected) > TOLERANCE


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings(activation):
    check_embeddings(CLIPVisionConfig(**TINY, hidden_act=activation), rows=2)


@pytest.mark.slow
@pytest.mark.heavy
def test_full_embeddings():
    """ViT-L/14 at 224 px, the tower of Stable Diffusion's safety checker."""
    check_embeddings(CLIPVisionConfig(**RELEASED["ViT-L/14"]), rows=1)


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(name):
    """The towers that CLIP was released with have transformers' tensors, name by name."""
    theirs = CLIPVisionConfig(**RELEASED[name])
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(theirs)
    expected = {plain(name): tuple(x.shape) for name, x in module.state_dict().items()}
    _, params = abstract(CLIPVision, ours(theirs))
    assert {torch_name(p): torch_shape(p, x.shape) for p, x in leaves(params)} == expected
