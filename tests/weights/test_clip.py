# SPDX-License-Identifier: Apache-2.0
"""Claims: a CLIP opens to the same parameters however it was written; faults take one line."""

import copy
import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from ip2p_jax.models.clip import CLIP
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import TextConfig
from ip2p_jax.weights.clip import load_clip
from ip2p_jax.weights.port import leaves
from tests.openai_clip import OpenAIClip, from_transformers
from tests.oracles import TINY_TEXT, randomize, small_tokenizer
from tests.weights.test_hub import put

pytestmark = pytest.mark.parity
TEXT: dict[str, Any] = {**TINY_TEXT, "num_attention_heads": 1}
VISION: dict[str, Any] = dict(
    image_size=16,
    patch_size=8,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=512,
)
SPACE = 24


def make(vocabulary: int) -> Any:
    """transformers' module with random weights, heads 64 wide as in OpenAI's."""
    text = {**TEXT, "vocab_size": vocabulary}
    return randomize(
        CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=SPACE)), 6
    )


def assert_same(a: dict, b: dict) -> None:
    """The same parameters, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder as transformers writes it."""
    path = tmp_path_factory.mktemp("clip")
    make(1024).save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(written, tmp_path / "clip"))


def test_folder(written):
    clip = load_clip(str(written))
    assert (clip.config.text.width, clip.config.vision.layers) == (64, 3)
    assert clip.config.vision.projection_dim == SPACE
    assert clip.tokenizer("red").input_ids[0] == 1022
    theirs = load_file(written / "model.safetensors")
    projection = clip.params["vision_model"]["visual_projection"]["weight"]
    np.testing.assert_array_equal(projection, theirs["visual_projection.weight"])
    assert sum(1 for _ in leaves(clip.params)) == len(theirs)
    for _, x in leaves(clip.params):
        assert x.dtype == np.float32 and not x.flags.owndata  # mapped, not copied


def released(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers 4 wrote it: integer buffers, towers in configurations of other names."""
    file = folder / "model.safetensors"
    buffers = {"text": torch.arange(77)[None], "vision": torch.arange(5)[None]}
    ids = {f"{tower}_model.embeddings.position_ids": x for tower, x in buffers.items()}
    tensors = load_file(file) | ids
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text", "vision"):
        config |= {f"{tower}_config_dict": config[f"{tower}_config"]}
        config |= {f"{tower}_config": {"hidden_size": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def pickled(folder: Path) -> None:
    """As released first, by torch.save."""
    torch.save(released(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder: Path) -> None:
    """In several files."""
    module: Any = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    module.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("rewrite", [released, pickled, sharded])
def test_generations_and_containers(rewrite, folder, written):
    rewrite(folder)
    ours, expected = load_clip(str(folder)), load_clip(str(written))
    assert ours.config == expected.config
    assert_same(ours.params, expected.params)


def test_a_hub_id_opens_from_the_cache(folder, tmp_path, monkeypatch):
    """Without network; pickled weights do where there are no others."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put(tmp_path / "hub", "owner/clip", "main", folder)
    expected = load_clip("owner/clip").params
    pickled(folder)
    put(tmp_path / "hub", "owner/old", "main", folder)
    assert_same(load_clip("owner/old").params, expected)
    with pytest.raises(FileNotFoundError, match="owner/none: .* not in the local cache"):
        load_clip("owner/none")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Any:
    """transformers' module with CLIP's whole vocabulary, and its folder without a tokenizer."""
    path = tmp_path_factory.mktemp("large")
    module = make(49408)
    module.save_pretrained(path)
    return module, path


@pytest.fixture(scope="module")
def openai(large) -> OpenAIClip:
    """The same CLIP as OpenAI's code has it."""
    module = OpenAIClip((16, 8, 128, 3), 49408, 64, 2, SPACE)
    module.load_state_dict(from_transformers(large[0].state_dict(), {"text": 2, "vision": 3}))
    return module.eval()


def test_a_folder_without_tokenizer_has_clips(large):
    tokenizer = load_clip(str(large[1])).tokenizer
    ids = tokenizer("a photo", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, *[49407] * 74]


def safetensors(module: OpenAIClip, path: Path) -> Path:
    save_file(module.state_dict(), path / "a.safetensors")
    return path / "a.safetensors"


def state_dict(module: OpenAIClip, path: Path) -> Path:
    torch.save(module.state_dict(), path / "a.pt")
    return path / "a.pt"


def torchscript(module: OpenAIClip, path: Path) -> Path:
    """As released: a traced module with sizes among its tensors, whose code is spoiled here."""
    module = copy.deepcopy(module)
    for name, size in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408)):
        module.register_buffer(name, torch.tensor(size))
    example = torch.zeros(1, 3, 16, 16), torch.zeros(1, 77, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes the shapes, and is deprecated
        torch.jit.save(torch.jit.trace(module, example), path / "whole.pt")
    with zipfile.ZipFile(path / "whole.pt") as whole, zipfile.ZipFile(path / "a.pt", "w") as spoilt:
        assert any("/code/__torch__" in name for name in whole.namelist())
        for name in whole.namelist():
            spoilt.writestr(name, b"raise" if "/code/" in name else whole.read(name))
    return path / "a.pt"


@pytest.mark.parametrize("write", [safetensors, state_dict, torchscript])
def test_openai_files(write, large, openai, tmp_path):
    """All give the parameters of the transformers folder, bit for bit."""
    ours, expected = load_clip(str(write(openai, tmp_path))), load_clip(str(large[1]))
    assert ours.config.vision == expected.config.vision
    assert ours.config.text == expected.config.text
    assert ours.config.text.eos_token_id == TextConfig.eos_token_id
    assert_same(ours.params, expected.params)
    assert ours.tokenizer("a photo").input_ids == [49406, 320, 1125, 49407]


def test_embeddings_of_openai(openai, tmp_path):
    """What is read embeds as OpenAI's module does; with q and k exchanged it does not."""
    clip = load_clip(str(safetensors(openai, tmp_path)))
    graphdef, _ = abstract(CLIP, clip.config)
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    texts = ["a street in snow", "two boats " * 60]
    options: Any = dict(padding="max_length", truncation=True, max_length=77)
    tokens = np.array(clip.tokenizer(texts, **options).input_ids, np.int32)
    with torch.no_grad():
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        expected = [x.numpy() for x in openai(image, torch.from_numpy(tokens).long())]

    @jax.jit
    def errors(params):
        module = nnx.merge(graphdef, params)
        ours = module.embed_images(jnp.array(pixels)), module.embed_texts(jnp.array(tokens))
        return [abs(a - b).max() / abs(b).max() for a, b in zip(ours, expected, strict=True)]

    assert max(errors(clip.params)) < 1e-4
    for tower in ("vision_model", "text_model"):
        attention = clip.params[tower]["encoder"]["layers"][0]["self_attn"]
        attention["q_proj"], attention["k_proj"] = attention["k_proj"], attention["q_proj"]
    assert min(errors(clip.params)) > 1e-2


def edit_config(folder: Path, part: str | None, **changes) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config).update(changes)
    file.write_text(json.dumps(config))
    return file


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replaces tensors, or leaves those out that are None; `__` stands for a dot."""
    file = folder / "model.safetensors"
    new = {name.replace("__", "."): x for name, x in changes.items()}
    tensors = load_file(file) | new
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    return file


def remove(file: Path) -> Path:
    file.unlink()
    return file


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: remove(f / "config.json"), "no such file"),
        (lambda f: remove(f / "model.safetensors"), "no such file; clip/ holds no safetensors"),
        (lambda f: edit_tensors(f, visual_projection__weight=None), "1 tensor missing: visual_pr"),
        (lambda f: edit_tensors(f, text_model__x=torch.ones(1)), r"unexpected: text_model.x \(1,"),
        (
            lambda f: edit_tensors(f, text_projection__weight=torch.ones(24, 65)),
            r"of another shape: text_projection.weight \(24, 65\), expected \(24, 64\)",
        ),
        (lambda f: edit_config(f, None, model_type="siglip"), "model_type 'siglip' is not support"),
        (lambda f: edit_config(f, "text_config", hidden_act="silu"), "hidden_act silu is not"),
        (lambda f: edit_config(f, "text_config", eos_token_id=[2, 3]), r"\[2, 3\] is not one tok"),
        (lambda f: edit_config(f, "text_config", eos_token_id=7).parent, "eos_token_id 7, the tok"),
        (lambda f: edit_config(f, "text_config", vocab_size=999).parent, "has 1024 entries, conf"),
        (without_tokenizer, "a vocabulary of 1024 entries is not CLIP's 49408"),
    ],
)
def test_spoiled_folders(spoil, told, folder):
    named = spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as error:
        load_clip(str(folder))
    assert str(named) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"visual.proj": None}, "no tensor visual.proj, so not a CLIP ViT in OpenAI's names"),
        ({"visual.conv1.weight": (128, 3, 8)}, r"visual.conv1.weight \(128, 3, 8\), expected 4 d"),
        ({"text_projection": (64, 25)}, r"text_projection \(64, 25\), expected \(64, 24\)"),
        ({"visual.conv1.weight": (96, 3, 8, 8)}, "conv1.weight is 96 wide, expected a multiple"),
        (
            {"visual.positional_embedding": (4, 128)},
            r"visual.positional_embedding \(4, 128\), expected \(2, 128\)",
        ),
        ({"ln_final.bias": None}, "1 tensor missing: ln_final.bias"),
        ({"visual.extra": (3,)}, "1 tensor unexpected: visual.extra"),
        (
            {"transformer.resblocks.1.attn.in_proj_bias": (193,)},
            r"1 tensor unexpected: transformer.resblocks.1.attn.in_proj_bias \(193,\)",
        ),
        ({"token_embedding.weight": (1000, 64)}, "a vocabulary of 1000 entries is not CLIP's"),
    ],
)
def test_spoiled_openai_files(changes, told, openai, tmp_path):
    tensors = openai.state_dict()
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{told}") as error:
        load_clip(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(error.value)


def test_a_file_in_transformers_names_is_told_from_openais(written):
    with pytest.raises(ValueError, match="no tensor token_embedding.weight.* give the folder"):
        load_clip(str(written / "model.safetensors"))


@pytest.mark.parametrize("name", ["nothing", "there/ViT-L-14.pt", "gs://bucket/clip"])
def test_what_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder, and not a hub"):
        load_clip(name)
