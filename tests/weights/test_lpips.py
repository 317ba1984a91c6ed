# SPDX-License-Identifier: Apache-2.0
"""Claims: torchvision's AlexNet and VGG16 open to the same parameters from every container; the
linear layers are the released ones; what is no such file is refused in one line."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.functional.image import lpips as theirs

from ip2p_jax.models.lpips import ALEX, VGG
from ip2p_jax.weights.lpips import HEADS, load_lpips
from ip2p_jax.weights.port import leaves
from ip2p_jax.weights.tensor_file import read
from tests.backbones import alexnet, state_dict, vgg16

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """AlexNet's file."""
    return state_dict(alexnet())


def zipped(tensors: dict, path: Path) -> None:
    torch.save(tensors, path)


def legacy(tensors: dict, path: Path) -> None:
    """As torchvision's older releases are."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [zipped, legacy, save_file])
def test_containers(write, tensors, tmp_path):
    path = tmp_path / ("a.safetensors" if write is save_file else "a.pth")
    write(tensors, path)
    opened = load_lpips(str(path))
    assert opened.config == ALEX
    kernel = opened.params["stages"][1]["convs"][0]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["features.3.weight"].permute(2, 3, 1, 0))
    bias = opened.params["stages"][4]["convs"][0]["bias"]
    np.testing.assert_array_equal(bias, tensors["features.10.bias"])
    assert len(list(leaves(opened.params))) == 2 * 5 + 5


def test_vgg(tmp_path):
    features = vgg16()
    zipped(state_dict(features), tmp_path / "a.pth")
    opened = load_lpips(str(tmp_path / "a.pth"))
    assert opened.config == VGG
    assert len(list(leaves(opened.params))) == 2 * 13 + 5
    for (i, j), at in {(0, 0): 0, (1, 1): 7, (2, 2): 14, (4, 2): 28}.items():
        kernel = opened.params["stages"][i]["convs"][j]["kernel"]
        expected = features.state_dict()[f"{at}.weight"].permute(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, expected)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(opened.params))


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_linear_layers_are_the_released_ones(name):
    """Bit for bit those that torchmetrics ships, and none is negative."""
    file = Path(theirs.__file__).parent / "lpips_models" / f"{name}.pth"
    expected = torch.load(file, map_location="cpu", weights_only=True)
    ours = {n: x for n, x in read(HEADS)[0].items() if n.startswith(name)}
    assert set(ours) == {f"{name}.{n}" for n in expected} and len(ours) == 5
    for n, x in expected.items():
        np.testing.assert_array_equal(ours[f"{name}.{n}"], x.numpy())
        assert x.min() >= 0
    assert "Richard Zhang" in (HEADS.parent / "LICENSE").read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"features.0.weight": None}, "no tensor features.0.weight, expected torchvision's Alex"),
        ({"features.0.weight": (96, 3, 7, 7)}, r"features.0.weight \(96, 3, 7, 7\), expected torc"),
        ({"features.0.weight": (64, 3, 3, 3)}, "VGG16: 22 tensors missing: features.2.bias"),
        ({"features.10.bias": None}, r"AlexNet: 1 tensor missing: features.10.bias \(256,\)"),
        ({"features.12.weight": (8,)}, r"AlexNet: 1 tensor unexpected: features.12.weight"),
        ({"features.6.bias": (8,)}, r"another shape: features.6.bias \(8,\), expected \(384,\)"),
    ],
)
def test_other_files(changes, told, tensors, tmp_path):
    tensors = dict(tensors)
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.zeros(shape)
    zipped(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{told}") as error:
        load_lpips(str(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)


def test_what_is_not_a_file(tmp_path):
    told = r"no such file, expected torchvision's AlexNet \(alexnet-owt-\*.pth\) or VGG16"
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=told):
            load_lpips(str(path))
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match="page.pth: not a sound torch checkpoint"):
        load_lpips(str(tmp_path / "page.pth"))
