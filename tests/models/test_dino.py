# SPDX-License-Identifier: Apache-2.0
"""Claims: DINO ViT-S/16 embeds pictures as transformers' ViTModel does what Pillow makes of them;
other pixels, an order of patches, or a norm left out are seen."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import ViTConfig, ViTModel

from ip2p_jax.models import dino as module
from ip2p_jax.models.dino import DINO, MEAN, STD, embed_pictures, preprocess
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import DINOConfig
from ip2p_jax.types import Params
from ip2p_jax.weights.dino import PretrainedDino, load_dino
from tests.evaluation.test_clip_scores import photos
from tests.oracles import randomize

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
VIT_S16: Any = dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
HEIGHT, WIDTH = 240, 301


def torchvision_view(picture: np.ndarray) -> np.ndarray:
    """`Resize(256, BICUBIC)` and `CenterCrop(224)` of a Pillow picture, as torchvision has them."""
    h, w = picture.shape[:2]
    size = (256, int(256 * h / w)) if w <= h else (int(256 * w / h), 256)
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = (int(round((side - 224) / 2.0)) for side in resized.shape[:2])
    return resized[top : top + 224, left : left + 224]


def normalised(views: np.ndarray) -> np.ndarray:
    return ((views / 255 - MEAN) / STD).astype(np.float32)


def levels(x: Any) -> np.ndarray:
    """What `preprocess` gives, back in 0 .. 255."""
    return (np.asarray(x) * STD + MEAN) * 255


@pytest.mark.parametrize(
    "size", [(512, 512), (512, 768), (257, 259), (100, 60), (256, 256)], ids=str
)
def test_preprocess(size):
    """Pillow's pixels, but for one level at a few where a half is rounded."""
    pictures = photos(*size)[:2]
    expected = np.stack([torchvision_view(x) for x in pictures]).astype(np.float32)
    off = abs(levels(preprocess(jnp.array(pictures), 224)) - expected)
    assert off.max() < 1.01 and (off > 0.01).mean() < 2e-4


@pytest.mark.parametrize(
    ("method", "antialias"),
    [("cubic", True), ("cubic", False), ("linear", True)],
    ids=["both sides at once", "not antialiased", "linear"],
)
def test_control_other_resizing(method, antialias):
    pictures = photos(512, 512)[:2]
    expected = np.stack([torchvision_view(x) for x in pictures])
    x = jax.image.resize(jnp.array(pictures, jnp.float32), (2, 256, 256, 3), method, antialias)
    other = np.round(x).clip(0, 255)[:, 16:240, 16:240]
    assert (abs(other - expected) > 0.5).mean() > 0.1


@pytest.fixture(scope="module")
def network() -> Any:
    """transformers' module with random weights; positions and class as large as patches."""
    module: Any = randomize(ViTModel(ViTConfig(**VIT_S16), add_pooling_layer=False), 7)
    for x in (module.embeddings.position_embeddings, module.embeddings.cls_token):
        x.data /= x.data.std()
    return module


@pytest.fixture(scope="module")
def dino(network, tmp_path_factory) -> PretrainedDino:
    folder: Path = tmp_path_factory.mktemp("dino")
    network.save_pretrained(folder)
    return load_dino(str(folder))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return photos(HEIGHT, WIDTH)[:2]


@pytest.fixture(scope="module")
def expected(network, pictures) -> np.ndarray:
    """The class tokens after the last norm, of Pillow's pixels."""
    x = normalised(np.stack([torchvision_view(x) for x in pictures]))
    with torch.no_grad():
        states = network(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state
    return states[:, 0].numpy()


@pytest.fixture(scope="module")
def program(dino) -> Any:
    return jax.jit(lambda p, x: embed_pictures(abstract(DINO, dino.config)[0], p, x))


def error(a: Any, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def test_embeddings(dino, pictures, expected, program):
    """With positions on their side, or pictures, or q for k, they are others."""
    assert (dino.config.width, dino.config.layers) == (DINOConfig.width, DINOConfig.layers)
    got = program(dino.params, pictures)
    assert got.shape == (2, 384) and got.dtype == np.float32
    assert np.ptp(expected, axis=0).max() > 0.1
    assert error(got, expected) < TOLERANCE
    for wrong in (turned(dino.params), exchanged(dino.params)):
        assert error(program(wrong, pictures), expected) > 10 * TOLERANCE
    assert error(program(dino.params, pictures[:, :, ::-1]), expected) > 10 * TOLERANCE


def turned(params: Params) -> Params:
    """Positions column by column."""
    table = np.asarray(params["embeddings"]["position_embedding"]["embedding"])
    grid = table[1:].reshape(14, 14, -1).swapaxes(0, 1).reshape(196, -1)
    rows = {"embedding": np.concatenate([table[:1], grid])}
    return params | {"embeddings": params["embeddings"] | {"position_embedding": rows}}


def exchanged(params: Params) -> Params:
    """The first layer's projections of q and v exchanged."""
    layers = dict(params["encoder"]["layers"])
    attention = layers[0]["self_attn"]
    attention = attention | {"q_proj": attention["v_proj"], "v_proj": attention["q_proj"]}
    layers[0] = layers[0] | {"self_attn": attention}
    return params | {"encoder": {"layers": layers}}


def test_control_without_the_last_norm(dino, pictures, expected, monkeypatch):
    def states(self, x):
        return self.encoder(self.embeddings(x))[:, 0]

    monkeypatch.setattr(module.DINO, "__call__", states)
    graphdef, _ = abstract(DINO, dino.config)
    got = jax.jit(lambda p, x: embed_pictures(graphdef, p, x))(dino.params, pictures)
    assert error(got, expected) > 10 * TOLERANCE


def test_inside_another_program():
    """It is of full precision under a program that is not."""
    graphdef, params = abstract(DINO, DINOConfig(32, 16, 64, 1, 1, 64))

    def program(params, x):
        with jax.default_matmul_precision("bfloat16"):
            return embed_pictures(graphdef, params, x)

    text = str(jax.make_jaxpr(program)(params, jnp.zeros((1, 40, 40, 3), jnp.uint8)))
    precisions = re.findall(r"\bprecision=(.*)", text)
    assert len(precisions) >= 8
    assert {x.strip("()").split(", ")[0] for x in precisions} == {"Precision.HIGHEST"}


def test_other_epsilons():
    """The norms' epsilon is the configuration's, in the layers too."""
    cfg = DINOConfig(32, 16, 64, 1, 1, 64, norm_eps=0.5)
    norms = [x for _, x in nnx.iter_graph(DINO(cfg, rngs=nnx.Rngs(0))) if hasattr(x, "epsilon")]
    assert [norm.epsilon for norm in norms] == [0.5] * 3
