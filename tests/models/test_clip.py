# SPDX-License-Identifier: Apache-2.0
"""CLIP's projected embeddings equal transformers' on torch; its tensors have released shapes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from ip2p_jax.models.clip import CLIP
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import CLIP_B16, CLIP_B32, CLIP_L14, CLIPConfig
from ip2p_jax.weights.configs import clip_from_json
from ip2p_jax.weights.names import CLIP_VISION, rename
from ip2p_jax.weights.port import from_torch, leaves, torch_name, torch_shape
from tests.models.test_clip_vision import RELEASED, TINY, error
from tests.oracles import FULL_TEXT, TINY_TEXT, randomize

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
BASE_TEXT = {**FULL_TEXT, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def their_config(text: dict[str, Any], vision: dict[str, Any]) -> TheirConfig:
    """transformers' configuration from those of its towers."""
    size = vision.get("projection_dim", 512)
    return TheirConfig(text_config=text, vision_config=vision, projection_dim=size)


def spell(name: str) -> str:
    return rename(name, CLIP_VISION)


def embed(cfg: CLIPConfig, module: torch.nn.Module, tokens, pixels) -> tuple:
    """Our text and image embeddings with the parameters of transformers' module."""
    graphdef, params = abstract(CLIP, cfg)
    tensors = {name: x.numpy() for name, x in module.state_dict().items()}
    params = from_torch(params, tensors, spell=spell)

    @jax.jit
    def both(params, tokens, pixels):
        clip = nnx.merge(graphdef, params)
        return clip.embed_texts(tokens), clip.embed_images(pixels)

    return tuple(map(np.asarray, both(params, tokens, pixels)))


def draw_tokens(text: dict[str, Any], rows: int) -> np.ndarray:
    """Rows that end at different places, padded by the end token; the highest id comes later."""
    end = text["eos_token_id"] if text["eos_token_id"] != 2 else text["vocab_size"] - 1
    rng = np.random.default_rng(5)
    tokens = rng.integers(3, end, (rows, 77), np.int32)
    for row, at in zip(tokens, rng.integers(5, 70, rows), strict=True):
        row[at:] = end
        row[at + 3] = text["vocab_size"] - 1
    return tokens


def check_embeddings(text: dict[str, Any], vision: dict[str, Any], rows: int) -> None:
    """Both embeddings agree; the text's does not where it is read by the other rule."""
    theirs: Any = their_config(text, vision)
    module: Any = randomize(CLIPModel(theirs), 4)
    tokens = draw_tokens(text, rows)
    size = theirs.vision_config.image_size
    pixels = np.random.default_rng(4).standard_normal((rows, size, size, 3), np.float32)
    with torch.no_grad():
        of_text = module.get_text_features(torch.from_numpy(tokens).long()).pooler_output
        of_image = module.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    cfg = clip_from_json(theirs.to_dict(), "config.json")
    ours = embed(cfg, module, tokens, pixels)
    assert error(ours[0], of_text.numpy()) < TOLERANCE
    assert error(ours[1], of_image.pooler_output.numpy()) < TOLERANCE
    end = 2 if text["eos_token_id"] != 2 else int(tokens[0, 0])
    other = replace(cfg, text=replace(cfg.text, eos_token_id=end))
    assert error(embed(other, module, tokens, pixels)[0], of_text.numpy()) > 100 * TOLERANCE


@pytest.mark.parametrize("end", [2, 1000])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings(activation, end):
    """Pooled at the highest id under the old configurations' end token 2, else at the first end."""
    shared = {"hidden_act": activation}
    check_embeddings({**TINY_TEXT, **shared, "eos_token_id": end}, {**TINY, **shared}, rows=3)


@pytest.mark.slow
@pytest.mark.heavy
def test_full_embeddings():
    """ViT-L/14 at 224 px."""
    check_embeddings(FULL_TEXT, RELEASED["ViT-L/14"], rows=1)


@pytest.mark.parametrize(
    ("name", "preset", "text"),
    [
        ("ViT-L/14", CLIP_L14, FULL_TEXT),
        ("ViT-B/16", CLIP_B16, BASE_TEXT),
        ("ViT-B/32", CLIP_B32, BASE_TEXT),
    ],
)
def test_released_shapes(name, preset, text):
    """The presets are what is read of released configurations, tensors are theirs name by name."""
    theirs = their_config(text, RELEASED[name])
    assert clip_from_json(theirs.to_dict(), "config.json") == preset
    with torch.device("meta"):
        module = CLIPModel(theirs)
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    _, params = abstract(CLIP, preset)
    assert {spell(torch_name(p)): torch_shape(p, x.shape) for p, x in leaves(params)} == expected
