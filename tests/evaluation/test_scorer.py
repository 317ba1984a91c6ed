# SPDX-License-Identifier: Apache-2.0
"""Claims: every score of a batch is what transformers, torchmetrics and scikit-image make of it;
the authors' normalisation is theirs; scores without what they need fall out.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F
from torchmetrics.functional.image import lpips as torch_lpips
from transformers import CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from ip2p_jax.evaluation.columns import SCORES
from ip2p_jax.evaluation.examples import Turn
from ip2p_jax.evaluation.scorer import (
    OF_CAPTIONS,
    OF_OUTPUT_CAPTION,
    OF_TARGET,
    Compared,
    Scorer,
    applicable,
    open_scorer,
)
from tests.backbones import alexnet, write
from tests.evaluation.test_clip_scores import photos, torch_preprocess
from tests.models.test_dino import MEAN, STD
from tests.oracles import TINY_CLIP_VISION, randomize
from tests.weights.test_dino import TINY as TINY_DINO

TOLERANCE = 1e-4
SIDE = 48
CLIP_SIZE = TINY_CLIP_VISION["image_size"]
CAPTIONS = [
    ("a street", "a street in snow"),
    ("a cup of coffee", "a cup of green tea"),
    ("a cat", "a fox, as an oil painting"),
    ("", "a portrait"),
]


class Files:
    """The networks that score, as files, and on torch."""

    def __init__(self, clip: Path, folder: Path):
        self.clip, self.dino, self.lpips = clip, folder / "dino", folder / "alexnet.pth"
        config = ViTConfig(**TINY_DINO, layer_norm_eps=1e-6)
        self.vit: Any = randomize(ViTModel(config, add_pooling_layer=False), 5)
        self.vit.save_pretrained(self.dino)
        features = alexnet()
        write(features, self.lpips)
        with pytest.MonkeyPatch.context() as patch:  # in the place of torchvision's
            patch.setattr(torch_lpips, "_get_tv_model_features", lambda *_: features)
            self.distance = torch_lpips._NoTrainLpips(net="alex")
        self.network: Any = CLIPModel.from_pretrained(clip).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(clip)


@pytest.fixture(scope="module")
def files(tiny_clip, tmp_path_factory) -> Files:
    return Files(tiny_clip, tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def scorer(files) -> Scorer:
    return open_scorer(*map(str, (files.clip, files.dino, files.lpips)))


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets, and results in about [-1, 1], which go beyond it."""
    inputs = photos(SIDE, SIDE)[:4]
    targets = (inputs * np.array([0.5, 0.7, 1.0])).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 0.2, inputs.shape)
    results = (targets / 127.5 - 1 + noise) * 1.2
    assert results.min() < -1.2 and results.max() > 1.2
    return inputs, targets, results.astype(np.float32)


def scores(scorer: Scorer, inputs, targets, results) -> dict[str, np.ndarray]:
    texts = [text for pair in CAPTIONS for text in pair]
    tokens = np.zeros((4, 2, 1), np.int32)
    if scorer.clip is not None:
        tokens = scorer.clip.tokenize(texts).reshape(4, 2, -1)
    seen = jax.jit(scorer.see)(scorer.params, inputs)
    known = jax.jit(scorer.refer)(scorer.params, Compared(targets, tokens))
    return jax.tree.map(np.asarray, jax.jit(scorer.score)(scorer.params, seen, known, results))


@pytest.fixture(scope="module")
def got(scorer, pictures) -> dict[str, np.ndarray]:
    return scores(scorer, *pictures)


def rounded(x: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] as what would be written to a file."""
    return np.rint(np.clip(x.astype(np.float64) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).float()


def clip_reference(files: Files, inputs, targets, results) -> dict[str, np.ndarray]:
    """CLIP's scores of pictures as float tensors, in whatever range."""

    @torch.no_grad()
    def image(x: torch.Tensor) -> torch.Tensor:
        pixels = torch_preprocess(x, CLIP_SIZE)
        return F.normalize(files.network.get_image_features(pixels).pooler_output)

    @torch.no_grad()
    def text(captions: tuple[str, ...]) -> torch.Tensor:
        ids = files.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )
        return F.normalize(files.network.get_text_features(ids.input_ids).pooler_output)

    before, target, after = map(image, (inputs, targets, results))
    text_0, text_1 = map(text, zip(*CAPTIONS, strict=True))
    pairs = {
        "clip_image": (before, after),
        "clip_direction": (after - before, text_1 - text_0),
        "clip_text": (after, text_1),
        "clip_target": (after, target),
    }
    return {name: F.cosine_similarity(*pair).numpy() for name, pair in pairs.items()}


def dino_embeddings(files: Files, pictures: np.ndarray) -> torch.Tensor:
    """Resized by Pillow to 8/7 of what the network takes, and cut."""
    size = TINY_DINO["image_size"]
    short = size * 8 // 7
    a = (short - size) // 2
    views = [
        np.asarray(Image.fromarray(x).resize((short, short), Image.Resampling.BICUBIC))
        for x in pictures
    ]
    x = (np.stack(views)[:, a : a + size, a : a + size] / 255 - MEAN) / STD
    with torch.no_grad():
        return files.vit(to_torch(x)).last_hidden_state[:, 0]


def reference(files: Files, inputs, targets, results) -> dict[str, np.ndarray]:
    """All scores."""
    result = rounded(results)
    expected = clip_reference(files, *(to_torch(x) / 255 for x in (inputs, targets, result)))
    options: Any = dict(channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5)
    options |= dict(use_sample_covariance=False)
    for suffix, others in (("_input", inputs), ("", targets)):
        a, b = result / 255, others / 255
        pairs = list(zip(a, b, strict=True))
        of_pixels = {
            "l1": abs(a - b).mean((1, 2, 3)),
            "l2": ((a - b) ** 2).mean((1, 2, 3)),
            "psnr": [peak_signal_noise_ratio(y, x, data_range=1) for x, y in pairs],
            "ssim": [structural_similarity(x, y, **options) for x, y in pairs],
        }
        expected |= {name + suffix: np.array(x) for name, x in of_pixels.items()}
        with torch.no_grad():
            distance = files.distance(*(to_torch(x) for x in (a, b)), normalize=True)
        expected["lpips" + suffix] = distance.flatten().numpy()
        embeddings = (dino_embeddings(files, x) for x in (result, others))
        expected["dino" + suffix] = F.cosine_similarity(*embeddings).numpy()
    return expected


@pytest.fixture(scope="module")
def expected(files, pictures) -> dict[str, np.ndarray]:
    return reference(files, *pictures)


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Relative, but of cosines and other small numbers absolute."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


@pytest.mark.parity
def test_every_score_of_a_table(got, expected):
    assert set(got) == set(expected) == set(SCORES)
    for name, x in got.items():
        assert x.shape == (4,) and np.ptp(expected[name]) > 1e-3, name  # worth comparing
        assert error(x, expected[name]) < TOLERANCE, name


@pytest.mark.parity
def test_controls_are_seen(scorer, pictures, expected):
    """Inputs and targets exchanged; results a level brighter."""
    inputs, targets, results = pictures
    exchanged = scores(scorer, targets, inputs, results)
    for name in set(SCORES) - {"clip_text"}:
        assert error(exchanged[name], expected[name]) > 10 * TOLERANCE, name
    brighter = scores(scorer, inputs, targets, results + 0.05)
    for name in SCORES:
        assert error(brighter[name], expected[name]) > TOLERANCE, name


@pytest.mark.parity
def test_legacy_is_the_authors_normalisation(files, scorer, pictures, got):
    """Pictures in [-1, 1] and the result not cut. Controls: ours, and the result cut."""
    legacy = scores(Scorer(scorer.clip, legacy=True), *pictures)
    inputs, targets, results = pictures
    given = [to_torch(x) / 127.5 - 1 for x in (inputs, targets)]
    theirs = clip_reference(files, *given, to_torch(results))
    cut = clip_reference(files, *given, to_torch(results).clamp(-1, 1))
    for name, want in theirs.items():
        assert error(legacy[name], want) < TOLERANCE, name
        assert error(got[name], want) > 10 * TOLERANCE, name
        assert error(cut[name], want) > 2 * TOLERANCE, name
    np.testing.assert_array_equal(legacy["ssim"], got["ssim"])


def test_without_networks_pixels_are_scored(got, pictures):
    plain = scores(Scorer(), *pictures)
    names = ("l1", "l2", "psnr", "ssim")
    assert set(plain) == {name + suffix for name in names for suffix in ("", "_input")}
    for name, x in plain.items():
        np.testing.assert_allclose(x, got[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("turn", "without"),
    [
        (Turn("x", "before", "after", b"png"), ()),
        (Turn("x", "before", "after"), OF_TARGET),
        (Turn("x", None, "after", b"png"), OF_CAPTIONS),
        (Turn("x", "before", None, b"png"), OF_CAPTIONS + OF_OUTPUT_CAPTION),
        (Turn("x"), OF_CAPTIONS + OF_OUTPUT_CAPTION + OF_TARGET),
    ],
)
def test_scores_without_what_they_need_fall_out(turn, without):
    every = {name: float(i) for i, name in enumerate(SCORES)}
    kept = applicable(every, turn)
    assert kept == {name: x for name, x in every.items() if name not in without}
    assert {"clip_image", "l1_input", "dino_input"} <= set(kept)


@pytest.mark.parametrize("option", ["clip", "dino", "lpips"])
def test_what_cannot_be_opened_names_its_option(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{option} .*none: .*no such file"):
        open_scorer(**{option: str(tmp_path / "none")})
