# SPDX-License-Identifier: Apache-2.0
"""Claims: LPIPS on AlexNet and VGG16 equals torchmetrics' on torch; nothing of it can be left out.

The backbones have random weights, the linear layers are the released ones, of which torchmetrics
has copies.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import lpips as theirs

from ip2p_jax.devices import shardings
from ip2p_jax.models import lpips as module
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.lpips import LPIPS, lpips
from ip2p_jax.types import Params
from ip2p_jax.weights.lpips import PretrainedLpips, load_lpips
from tests.backbones import BACKBONES, write
from tests.evaluation.test_clip_scores import photos

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
HEIGHT, WIDTH = 47, 60


class Case(NamedTuple):
    """LPIPS on one backbone, ours and in torch."""

    pretrained: PretrainedLpips
    graphdef: Any
    network: Any


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and the same ones: darker, noisy, with their colours exchanged."""
    a = photos(HEIGHT, WIDTH)[:3]
    noise = np.random.default_rng(0).normal(0, 20, a[1].shape)
    b = a[0] // 2, np.clip(a[1] + noise, 0, 255).astype(np.uint8), a[2, :, :, ::-1]
    return a, np.stack(b)


@pytest.fixture(scope="module", params=BACKBONES)
def case(request, tmp_path_factory) -> Case:
    features = BACKBONES[request.param]()
    pretrained = load_lpips(str(write(features, tmp_path_factory.mktemp("lpips") / "a.pth")))
    assert pretrained.config.name == request.param
    graphdef, _ = abstract(LPIPS, pretrained.config)
    with pytest.MonkeyPatch.context() as patch:  # in the place of torchvision's
        patch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
        return Case(pretrained, graphdef, theirs._NoTrainLpips(net=request.param))


def test_rows_stay_on_their_devices():
    """On eight devices no features pass between them. Control: batches that are joined."""
    graphdef, params = abstract(LPIPS, module.ALEX)
    by_row = shardings(jax.devices()).by_row
    rows = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8, sharding=by_row)
    moves = ("all-to-all", "collective-permute", "all-gather")

    def moved(function) -> bool:
        program = jax.jit(function, out_shardings=by_row).lower(params, rows, rows).compile()
        return any(move in str(program.as_text()) for move in moves)

    assert not moved(functools.partial(lpips, graphdef))
    assert moved(lambda params, a, b: 2.0 * jnp.concatenate([a, b])[8:24])


ALEX_ONLY = pytest.mark.parametrize("case", ["alex"], indirect=True)


def expect(case: Case, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """torchmetrics' distances."""
    x, y = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (a, b))
    with torch.no_grad():
        return case.network(x, y, normalize=True).flatten().numpy()


def distances(case: Case, a: np.ndarray, b: np.ndarray, params: Params | None = None) -> np.ndarray:
    # A function of its own for each call: controls change what the tracing meets.
    program = jax.jit(lambda p, a, b: lpips(case.graphdef, p, a, b))
    return np.asarray(program(params or case.pretrained.params, a, b))


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_distances(case, pictures):
    got, expected = distances(case, *pictures), expect(case, *pictures)
    assert got.shape == (3,) and got.dtype == np.float32
    assert min(expected) > 0.01 and np.ptp(expected) > 0.01  # worth comparing
    assert error(got, expected) < TOLERANCE


@ALEX_ONLY
def test_control_without_linear_layers(case, pictures):
    """Channels that count alike are another distance."""
    heads = case.pretrained.params["heads"]
    even = jax.tree.map(lambda x: np.full_like(x, x.mean()), heads)
    got = distances(case, *pictures, params=case.pretrained.params | {"heads": even})
    assert error(got, expect(case, *pictures)) > 10 * TOLERANCE


@ALEX_ONLY
@pytest.mark.parametrize(
    ("name", "value"),
    [("SHIFT", (0.0,) * 3), ("SCALE", (1.0,) * 3), ("directions", lambda x: x)],
)
def test_control_without(name, value, case, pictures, monkeypatch):
    """The scaling layer's shift or scale, or features of length 1."""
    monkeypatch.setattr(module, name, value)
    assert error(distances(case, *pictures), expect(case, *pictures)) > 10 * TOLERANCE


@ALEX_ONLY
def test_rows(case, pictures):
    """Nothing is between a picture and itself, whatever else is in the batch."""
    mixed = np.stack([pictures[0][0], pictures[1][1], pictures[0][2]])
    first, second, third = distances(case, pictures[0], mixed)
    assert first == third == 0
    assert abs(second - expect(case, *pictures)[1]) < TOLERANCE * second


@ALEX_ONLY
def test_inside_another_program(case, pictures):
    """It is of full precision under a program that is not."""

    def program(params, a, b):
        with jax.default_matmul_precision("bfloat16"):
            return lpips(case.graphdef, params, a, b)

    text = str(jax.make_jaxpr(program)(case.pretrained.params, *map(jnp.array, pictures)))
    precisions = re.findall(r"\bprecision=(.*)", text)
    assert len(precisions) >= 10 and set(precisions) == {"(Precision.HIGHEST, Precision.HIGHEST)"}


def test_smallest_pictures(case):
    """At the least size the last map has one position; below it there would be none."""
    side = case.pretrained.config.smallest
    a, b = (x[:, :side, : side + 1] for x in (photos(64, 64)[:1], photos(64, 64)[1:2]))
    assert error(distances(case, a, b), expect(case, a, b)) < TOLERANCE
    told = f"LPIPS of pictures of {side - 1} x {side} pixels, expected at least {side} x {side}"
    with pytest.raises(ValueError, match=told):
        distances(case, a[:, :, : side - 1], b[:, :, : side - 1])
