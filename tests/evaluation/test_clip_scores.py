# SPDX-License-Identifier: Apache-2.0
"""Claims: scores equal a torch transcription of their definition; a row depends on itself alone."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ip2p_jax.evaluation import clip_scores as module
from ip2p_jax.evaluation.clip_scores import Clip, ClipScores, clip_scores, embed_images, preprocess
from ip2p_jax.models.clip import MEAN, STD, unit
from ip2p_jax.weights.clip import load_clip
from tests.models.test_clip_vision import TINY as TINY_VISION
from tests.oracles import TINY_TEXT, randomize, small_tokenizer

TOLERANCE = 1e-4
SIZE = TINY_VISION["image_size"]
CAPTIONS = [
    ("a street", "a street in snow"),
    ("a cup of coffee", "a cup of green tea"),
    ("a cat", "a fox, as an oil painting"),
    ("a rocket " * 60, "a rocket at night " * 60),  # over 77 tokens
    ("", "a portrait"),
]


def photos(height: int, width: int) -> np.ndarray:
    """Five photographs of one size."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "retina")
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    return np.stack([np.asarray(picture.resize((width, height))) for picture in pictures])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights, written by transformers."""
    path = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=24)
    network: Any = randomize(CLIPModel(config), 8)
    network.save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return Clip(load_clip(str(folder)), rows=2)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and the same ones darker and bluer."""
    first = photos(64, 96)
    return first, (first * np.array([0.5, 0.7, 1.0])).astype(np.uint8)


def torch_preprocess(x: torch.Tensor, size: int) -> torch.Tensor:
    """The authors' pixels: (b, 3, h, w) in [0, 1] to (b, 3, size, size)."""
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (MEAN, STD))
    return (x - mean) / std


@pytest.fixture(scope="module")
def expected(folder, pictures) -> ClipScores:
    """The scores by torch and transformers, float32."""
    network: Any = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def image(x: np.ndarray) -> torch.Tensor:
        pixels = torch_preprocess(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, SIZE)
        return F.normalize(network.get_image_features(pixels).pooler_output)

    @torch.no_grad()
    def text(captions: tuple[str, ...]) -> torch.Tensor:
        ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return F.normalize(network.get_text_features(ids.input_ids).pooler_output)

    image_0, image_1 = map(image, pictures)
    text_0, text_1 = map(text, zip(*CAPTIONS, strict=True))
    pairs = (
        (image_0, text_0),
        (image_1, text_1),
        (image_1 - image_0, text_1 - text_0),
        (image_0, image_1),
    )
    return ClipScores(*(F.cosine_similarity(a, b).numpy() for a, b in pairs))


def errors(got: ClipScores, expected: ClipScores) -> ClipScores:
    return ClipScores(*(float(abs(a - b).max()) for a, b in zip(got, expected, strict=True)))


@pytest.mark.parity
def test_scores(clip, pictures, expected):
    got = clip.scores(*pictures, *zip(*CAPTIONS, strict=True))
    assert max(errors(got, expected)) < TOLERANCE
    assert all(x.shape == (5,) and x.dtype == np.float32 for x in got)
    assert all(np.ptp(x) > 0.05 for x in expected)  # worth comparing


def resized(method: str, antialias: bool, low: float = 0.0):
    """A preprocessing like ours, of pixels in [low, 1]."""

    def prepare(x, size):
        x = jax.image.resize(x * (1 - low) + low, (len(x), size, size, 3), method, antialias)
        return (x - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]

    return prepare


@pytest.mark.parity
@pytest.mark.parametrize(
    "wrong",
    [resized("cubic-pytorch", True), resized("cubic", False), resized("cubic-pytorch", False, -1)],
    ids=["antialiased", "a = -0.5", "pixels in [-1, 1]"],
)
def test_control_preprocessing(wrong, folder, pictures, expected, monkeypatch):
    """With other pixels every score that looks at pictures is another."""
    monkeypatch.setattr(module, "preprocess", wrong)
    got = Clip(load_clip(str(folder)), rows=2).scores(*pictures, *zip(*CAPTIONS, strict=True))
    assert min(errors(got, expected)) > 10 * TOLERANCE


@pytest.mark.parity
def test_control_direction(clip, pictures, expected):
    """Differences of embeddings that are not normalised point elsewhere."""
    image_0, image_1 = map(clip.embed_images, pictures)
    text_0, text_1 = (clip.embed_texts(x) for x in zip(*CAPTIONS, strict=True))
    a, b = (np.asarray(unit(jnp.array(x))) for x in (image_1 - image_0, text_1 - text_0))
    assert abs((a * b).sum(axis=1) - expected.sim_dir).max() > 10 * TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("height, width", [(512, 512), (256, 384), (64, 64), (100, 60)])
def test_preprocess(height, width):
    """Pixels are torch's, both smaller and larger; other cubics are not near."""
    x = photos(height, width)[:2].astype(np.float32) / 255
    theirs = torch_preprocess(torch.from_numpy(x).permute(0, 3, 1, 2), 224)
    theirs = theirs.permute(0, 2, 3, 1).numpy()

    def furthest(prepare) -> float:
        """In units of the pixels, black to white."""
        return float(abs((np.asarray(prepare(jnp.array(x), 224)) - theirs) * STD).max())

    assert furthest(preprocess) < 1e-5
    assert furthest(resized("cubic", False)) > 1e-2
    assert height < 224 or furthest(resized("cubic-pytorch", True)) > 1e-2


def test_preprocess_of_the_size_itself():
    """Only mean and deviation."""
    x = photos(32, 32).astype(np.float32) / 255
    np.testing.assert_allclose(preprocess(jnp.array(x), 32), (x - MEAN) / STD, atol=1e-6)


def test_scores_of_embeddings():
    """By hand: lengths do not matter; the change of the pictures is half the captions' way."""
    e = np.eye(4, dtype=np.float32)
    image_0, image_1 = jnp.array([e[0], e[0], e[0]]), jnp.array([5 * e[1], e[1], 3 * e[0]])
    text_0, text_1 = jnp.array([2 * e[0], e[0], e[1]]), jnp.array([e[1], e[2], e[2]])
    scores = clip_scores(image_0, image_1, text_0, text_1)
    np.testing.assert_allclose(scores.sim_0, [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(scores.sim_1, [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scores.sim_dir, [1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(scores.sim_image, [0, 0, 1], atol=1e-6)


def test_a_row_depends_on_itself_alone(folder, clip, pictures):
    """Bit for bit: not on what fills a batch, nor on the number of devices."""
    captions = [a for a, _ in CAPTIONS]
    images, texts = clip.embed_images(pictures[0]), clip.embed_texts(captions)
    assert np.ptp(images, axis=0).min() > 0 and np.ptp(texts, axis=0).min() > 0
    np.testing.assert_array_equal(clip.embed_images(pictures[0][4:]), images[4:])
    np.testing.assert_array_equal(clip.embed_texts(captions[2:4]), texts[2:4])
    spread = Clip(load_clip(str(folder)), devices=jax.local_devices()[:4], rows=2)
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 4
    np.testing.assert_array_equal(spread.embed_images(pictures[0]), images)
    np.testing.assert_array_equal(spread.embed_texts(captions), texts)


def test_inside_another_program(clip, pictures):
    """The core is of full precision under a program that is not, and gives the same."""

    def program(params, x):
        with jax.default_matmul_precision("bfloat16"):
            return embed_images(clip.graphdef, params, x)

    x = jnp.array(pictures[0])
    precisions = re.findall(r"\bprecision=(.*)", str(jax.make_jaxpr(program)(clip.params, x)))
    assert set(precisions) == {"(Precision.HIGHEST, Precision.HIGHEST)"}
    got = jax.jit(program)(clip.params, x)
    np.testing.assert_allclose(got, clip.embed_images(pictures[0]), atol=1e-5)


def test_no_change_has_no_direction(clip, pictures):
    captions = [a for a, _ in CAPTIONS]
    scores = clip.scores(pictures[0], pictures[0], captions, captions)
    np.testing.assert_array_equal(scores.sim_dir, 0)
    np.testing.assert_allclose(scores.sim_image, 1, atol=1e-6)
    np.testing.assert_array_equal(scores.sim_0, scores.sim_1)


def test_half_precision_and_nothing_at_all(folder, clip, pictures):
    half = Clip.from_pretrained(str(folder), jnp.bfloat16)
    assert jax.tree.leaves(half.params)[0].dtype == jnp.bfloat16
    got, exact = (c.embed_images(pictures[0]) for c in (half, clip))
    assert got.dtype == np.float32
    assert 1e-4 < abs(got - exact).max() / abs(exact).max() < 0.1
    assert half.embed_images(pictures[0][:0]).shape == (0, 24)


def test_counts_have_to_agree(clip, pictures):
    with pytest.raises(ValueError, match=r"scores: \(5, 5, 5, 4\) pictures and captions"):
        clip.scores(*pictures, ["a"] * 5, ["b"] * 4)
