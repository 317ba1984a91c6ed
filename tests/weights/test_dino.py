# SPDX-License-Identifier: Apache-2.0
"""Claims: a DINO opens to the same parameters however it was written; faults take one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from ip2p_jax.models.dino import DINO
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import DINOConfig
from ip2p_jax.weights.dino import load_dino
from ip2p_jax.weights.port import leaves
from tests.backbones import OriginalDino, dino_from_transformers
from tests.oracles import randomize
from tests.weights.test_hub import put

pytestmark = pytest.mark.parity
TINY: dict[str, Any] = dict(
    image_size=32,
    patch_size=8,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=192,
)
SIZES = (32, 8, 128, 2, 2, 192)
"""The same for `DINOConfig` and `OriginalDino`."""


def make(**options) -> Any:
    """transformers' module with random weights, norms as in DINO's code."""
    config = ViTConfig(**TINY, layer_norm_eps=1e-6)
    return randomize(ViTModel(config, **options), 5)


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def module() -> Any:
    return make(add_pooling_layer=False)


@pytest.fixture(scope="module")
def written(module, tmp_path_factory) -> Path:
    """A folder as transformers writes it."""
    path = tmp_path_factory.mktemp("dino")
    module.save_pretrained(path)
    return path


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(written, tmp_path / "dino"))


def test_folder(written):
    dino = load_dino(str(written))
    assert dino.config == DINOConfig(*SIZES)
    theirs = load_file(written / "model.safetensors")
    assert "encoder.layer.1.attention.attention.query.weight" in theirs  # as in released files
    query = dino.params["encoder"]["layers"][1]["self_attn"]["q_proj"]["weight"]
    name = "encoder.layer.1.attention.attention.query.weight"
    np.testing.assert_array_equal(query, theirs[name])
    assert sum(1 for _ in leaves(dino.params)) == len(theirs)
    assert all(x.dtype == np.float32 for _, x in leaves(dino.params))


def released(folder: Path) -> None:
    """As facebook's first was: pickled, with a pooler that was never trained."""
    tensors = load_file(folder / "model.safetensors")
    pooler = {"pooler.dense.weight": torch.ones(128, 128), "pooler.dense.bias": torch.ones(128)}
    torch.save(tensors | pooler, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_hub_id_opens_from_the_cache(folder, tmp_path, monkeypatch):
    """Without network; pickled weights do where there are no others."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put(tmp_path / "hub", "owner/dino", "main", folder)
    expected = load_dino("owner/dino").params
    released(folder)
    put(tmp_path / "hub", "owner/old", "main", folder)
    assert_same(load_dino("owner/old").params, expected)
    with pytest.raises(FileNotFoundError, match="owner/none: .* not in the local cache"):
        load_dino("owner/none")


@pytest.fixture(scope="module")
def original(module) -> OriginalDino:
    """The same DINO as its own code has it."""
    ours = OriginalDino(*SIZES)
    ours.load_state_dict(dino_from_transformers(module.state_dict()))
    return ours.eval()


def test_the_original_is_the_same_network(module, original):
    """torch against torch: so a file in its names means what the folder means."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(original(x), module(x).last_hidden_state[:, 0])


@pytest.mark.parametrize("container", ["a.pth", "legacy.pth", "a.safetensors"])
def test_original_files(container, original, written, tmp_path):
    """All give the parameters of the transformers folder, bit for bit."""
    path, state = tmp_path / container, original.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in container)
    ours, expected = load_dino(str(path)), load_dino(str(written))
    assert ours.config == expected.config
    assert_same(ours.params, expected.params)


def test_size_of_the_default():
    """ViT-S/16 has as many parameters as released."""
    _, params = abstract(DINO, DINOConfig())
    assert sum(np.prod(x.shape) for _, x in leaves(params)) == 21_665_664


def edit_config(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def edit_tensors(folder: Path, name: str, x: torch.Tensor | None) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name: x}
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    return file


def remove(file: Path) -> Path:
    file.unlink()
    return file


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: remove(f / "config.json"), "no such file"),
        (lambda f: remove(f / "model.safetensors"), "no such file; dino/ holds no safetensors"),
        (lambda f: edit_config(f, model_type="dinov2"), "model_type 'dinov2' is not supported"),
        (lambda f: edit_config(f, qkv_bias=False), "qkv_bias False is not supported"),
        (lambda f: edit_config(f, patch_size=[8, 16]), r"patch_size \[8, 16\] differs"),
        (lambda f: edit_tensors(f, "layernorm.bias", None), "1 tensor missing: layernorm.bias"),
        (lambda f: edit_tensors(f, "classifier.bias", torch.ones(3)), "unexpected: classifier.bi"),
        (
            lambda f: edit_tensors(f, "embeddings.position_embeddings", torch.ones(1, 18, 128)),
            r"embeddings.position_embeddings \(18, 128\), expected \(17, 128\)",
        ),
    ],
)
def test_spoiled_folders(spoil, told, folder):
    named = spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        load_dino(str(folder))
    assert str(named) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch_embed.proj.weight": None}, "no tensor patch_embed.proj.weight, so not a backb"),
        ({"patch_embed.proj.weight": (128, 3, 8)}, r"\(128, 3, 8\), expected 4 dimensions"),
        (
            {"patch_embed.proj.weight": (96, 3, 8, 8)},
            "weight is 96 wide, expected a multiple of 64",
        ),
        ({"blocks.0.mlp.fc1.weight": None}, "no tensor blocks.0.mlp.fc1.weight"),
        ({"blocks.1.attn.qkv.bias": None}, "3 tensors missing: blocks.1.attn.k.bias"),
        ({"cls_token": (1, 1, 64)}, r"cls_token \(64,\), expected \(128,\)"),
        ({"head.weight": (3, 128)}, r"1 tensor unexpected: head.weight \(3, 128\)"),
    ],
)
def test_spoiled_original_files(changes, told, original, tmp_path):
    tensors = original.state_dict()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{told}") as error:
        load_dino(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(error.value)


def test_a_file_of_transformers_is_told(written):
    with pytest.raises(ValueError, match="no tensor patch_embed.proj.weight.* give the folder"):
        load_dino(str(written / "model.safetensors"))


@pytest.mark.parametrize("name", ["nothing", "there/dino_deitsmall16_pretrain.pth"])
def test_what_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder, and not a hub"):
        load_dino(name)
