# SPDX-License-Identifier: Apache-2.0
"""Claims: a hub id opens from the cache without network; only needed files are asked for."""

import atexit
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from etils import epath
from huggingface_hub.utils import filter_repo_objects

from ip2p_jax.weights.hub import CLIP, CLIP_SAFETENSORS, fetch, patterns, vae_patterns
from ip2p_jax.weights.load import load, load_vae
from tests.oracles import tiny_folder

COMMITS = {"main": "31519b5cb02a7fd89b906d88731cd4d6a7bbf88d", "fp16": 40 * "a"}


def put(cache: Path, repo: str, revision: str, folder: Path) -> None:
    """Lays a folder out as huggingface_hub does: blobs, links to them in a snapshot, refs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(COMMITS[revision])
    for file in (path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        blob = root / "blobs" / f"{revision}-{str(name).replace('/', '-')}"
        shutil.copy(file, blob)
        link = root / "snapshots" / COMMITS[revision] / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_ip2p) -> Path:
    path = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    put(path, "owner/editor", "main", tiny_ip2p)
    return path


def test_a_hub_id_opens_from_the_cache(cache, tiny_ip2p):
    got = load("owner/editor")
    assert got.config == load(str(tiny_ip2p)).config
    assert load("owner/editor", revision=COMMITS["main"]).config == got.config


def test_a_vae_from_the_cache(cache, tiny_ip2p):
    """The id of a VAE alone, and that of a whole model."""
    put(cache, "owner/vae", "main", tiny_ip2p / "vae")
    want = load(str(tiny_ip2p))
    for name in ("owner/vae", "owner/editor"):
        cfg, params = load_vae(name)
        assert cfg == want.config.vae
        kernel = params["decoder"]["conv_in"]["kernel"]
        np.testing.assert_array_equal(kernel, want.params["vae"]["decoder"]["conv_in"]["kernel"])
    with pytest.raises(FileNotFoundError, match="^owner/none: .*the hub cannot be reached"):
        load_vae("owner/none")


def test_revision_and_variant(cache, tmp_path):
    half = tiny_folder(tmp_path / "half", in_channels=4, variant="fp16", dtype=torch.float16)
    put(cache, "owner/editor", "fp16", half)
    model = load("owner/editor", revision="fp16", variant="fp16")
    assert model.config.unet.in_channels == 4
    assert load("owner/editor").config.unet.in_channels == 8


@pytest.mark.parametrize(
    ("name", "revision"), [("owner/nothing", None), ("owner/editor", "nowhere")]
)
def test_no_network_and_no_cache_is_one_line(cache, name, revision):
    with pytest.raises(FileNotFoundError, match="not in the local cache, and the hub cannot") as e:
        load(name, revision=revision)
    assert str(e.value).startswith(name) and "\n" not in str(e.value)
    assert (revision is None) or revision in str(e.value)


def test_a_snapshot_that_lacks_the_variant_is_one_line(cache):
    with pytest.raises(FileNotFoundError, match="model.fp16.safetensors: no such file"):
        load("owner/editor", variant="fp16")


REPOSITORY = """
README.md model_index.json instruct-pix2pix-00-22000.ckpt instruct-pix2pix-00-22000.safetensors
imgs/example.jpg feature_extractor/preprocessor_config.json scheduler/scheduler_config.json
safety_checker/config.json safety_checker/model.safetensors safety_checker/model.fp16.safetensors
safety_checker/pytorch_model.bin
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin text_encoder/flax_model.msgpack
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.fp16.json
unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
vae/config.json vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.msgpack
vae/diffusion_pytorch_model.fp16.safetensors
""".split()


def wanted(variant: str | None, safety: bool) -> set[str]:
    return set(filter_repo_objects(REPOSITORY, allow_patterns=patterns(variant, safety)))


def test_only_the_needed_files_are_asked_for():
    small = {name for name in REPOSITORY if name.endswith((".json", ".txt"))}
    small -= {name for name in small if ".index." in name or name.startswith(("safety", "feature"))}
    assert wanted(None, False) == small | {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert wanted("fp16", False) == small | {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert wanted(None, True) - wanted(None, False) == {
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    }


def test_a_clip_needs_one_kind_of_weights():
    names = """README.md config.json flax_model.msgpack merges.txt preprocessor_config.json
    model-00001-of-00002.safetensors model.fp16.safetensors model.safetensors
    model.safetensors.index.json pytorch_model.bin special_tokens_map.json tf_model.h5
    tokenizer.json tokenizer_config.json vocab.json onnx/config.json""".split()
    text = {name for name in names if name.endswith((".json", ".txt")) and "index" not in name}
    text -= {"preprocessor_config.json", "onnx/config.json"}
    assert set(filter_repo_objects(names, allow_patterns=[*CLIP])) == text
    assert set(filter_repo_objects(names, allow_patterns=[*CLIP_SAFETENSORS])) == {
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    }


def test_of_a_vae_only_its_own_files():
    alone = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    got = set(filter_repo_objects([*REPOSITORY, *alone], allow_patterns=vae_patterns()))
    assert got == {*alone[:2], "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def test_a_run_in_a_bucket(tmp_path, monkeypatch):
    """Everything but the checkpoints is copied, for as long as the process lives; file:// stands
    for gs:// here."""
    at_the_end = []
    monkeypatch.setattr(atexit, "register", lambda *args, **more: at_the_end.append((args, more)))
    (tmp_path / "run" / "base" / "vae").mkdir(parents=True)
    (tmp_path / "run" / "base" / "vae" / "config.json").write_text("{}")
    local = fetch(epath.Path(tmp_path / "run"))
    assert (local / "vae" / "config.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError, match=r"not a run directory \(no base/ inside\)"):
        fetch(epath.Path(tmp_path))
    [((remove, *args), more)] = at_the_end
    remove(*args, **more)
    assert not local.exists()
