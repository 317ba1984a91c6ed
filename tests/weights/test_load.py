# SPDX-License-Identifier: Apache-2.0
"""Claims: every kind of model opens to the same parameters; every fault is named in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.torch import load_file, save_file

from ip2p_jax.models.presets import TINY
from ip2p_jax.weights import hub
from ip2p_jax.weights.load import load, load_vae
from ip2p_jax.weights.names import Names
from ip2p_jax.weights.port import leaves
from tests.oracles import tiny_folder
from tests.weights.folders import FILES, ldm_state, released_names


def assert_same(a: dict, b: dict):
    """The same parameters, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tiny_ip2p, tmp_path) -> Path:
    """A copy of the tiny folder, to damage."""
    return Path(shutil.copytree(tiny_ip2p, tmp_path / "folder"))


def test_diffusers_folder(tiny_ip2p):
    model = load(str(tiny_ip2p))
    assert model.config == TINY.widened()
    assert model.names == Names(text_prefix=False)
    assert model.scheduler["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert model.safety is None
    assert model.tokenizer("red").input_ids[0] == 1022
    kernel = load_file(tiny_ip2p / FILES["unet"])["conv_in.weight"].permute(2, 3, 1, 0)
    np.testing.assert_array_equal(model.params["unet"]["conv_in"]["kernel"], kernel)
    for _, x in leaves(model.params):
        assert x.dtype == np.float32 and not x.flags.owndata  # mapped, not copied


def test_both_generations_of_names(tiny_ip2p, tmp_path):
    old = load(str(released_names(tiny_ip2p, tmp_path / "old")))
    assert old.names == Names(text_prefix=True, position_ids=True, old_attention=True)
    assert_same(old.params, load(str(tiny_ip2p)).params)


def test_sharded_folder(tiny_ip2p, tmp_path):
    sharded = tiny_folder(tmp_path, max_shard_size="300KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 10
    assert_same(load(str(sharded)).params, load(str(tiny_ip2p)).params)
    shard = sorted((sharded / "vae").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file, but .*index.json"):
        load(str(sharded))


def test_an_index_may_only_name_files_beside_it(folder):
    (folder / FILES["unet"]).unlink()
    index = folder / (FILES["unet"] + ".index.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/model.safetensors"}}))
    with pytest.raises(ValueError, match="expected a weight_map of tensors to files beside it"):
        load(str(folder))


@pytest.mark.parametrize("sharded", [False, True])
def test_variants(tiny_ip2p, tmp_path, sharded):
    options = {"max_shard_size": "300KB"} if sharded else {}
    half = tiny_folder(tmp_path, variant="fp16", dtype=torch.float16, **options)
    model = load(str(half), variant="fp16")
    full = load(str(tiny_ip2p)).params
    assert_same(model.params, jax.tree.map(lambda x: x.astype(np.float16).astype("f4"), full))
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file; .*fp16"):
        load(str(half))
    with pytest.raises(FileNotFoundError, match=r"model.fp16.safetensors: no such file; unet/"):
        load(str(tiny_ip2p), variant="fp16")


def test_safety_checker_and_its_feature_extractor(folder):
    assert load(str(folder)).safety is None
    (folder / "safety_checker").mkdir()
    assert load(str(folder)).safety == folder / "safety_checker"


def test_embedded_model(tiny_ip2p, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    shutil.copytree(tiny_ip2p, tmp_path / "small")
    assert hub.embedded() == ["small"]
    assert_same(load("small").params, load(str(tiny_ip2p)).params)


def save_run(run: Path, folder: Path, trained: dict, steps: tuple[int, ...] = (10, 20)) -> None:
    """Writes a run directory as training does; the EMA of step n is the parameters plus n."""
    (run / "config.json").parent.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    shutil.copytree(folder, run / "base")
    names = ("train", "ema", "data", "config")
    with ocp.CheckpointManager(run / "checkpoints", item_names=names) as manager:
        for step in steps:
            ema = jax.tree.map(lambda x, n=step: jnp.asarray(x) + n, trained)
            items = {"train": ocp.args.StandardSave({"step": jnp.ones(3)})}
            items |= {"ema": ocp.args.StandardSave(ema)}
            items |= {name: ocp.args.JsonSave({}) for name in ("data", "config")}
            manager.save(step, args=ocp.args.Composite(**items))


@pytest.mark.parametrize("parts", [["unet"], ["unet", "text"]])
def test_run_directory(tiny_ip2p, tmp_path, parts):
    """The frozen parts come from base/, the trained ones are the EMA of the latest step."""
    start = load(str(tiny_ip2p))
    save_run(tmp_path / "run", tiny_ip2p, {part: start.params[part] for part in parts})
    for part in parts:
        (tmp_path / "run" / "base" / FILES[part]).unlink()
    run = load(str(tmp_path / "run"))
    assert run.config == start.config
    assert run.names == Names(text_prefix="text" in parts)
    assert run.tokenizer.get_vocab() == start.tokenizer.get_vocab()
    for part, params in start.params.items():
        n = 20 if part in parts else 0
        assert_same(run.params[part], jax.tree.map(lambda x, n=n: x + np.float32(n), params))


def test_vae_run_directory(tiny_ip2p, tmp_path):
    cfg, params = load_vae(str(tiny_ip2p))
    assert cfg == TINY.vae
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "vae").mkdir()
    shutil.copy(tiny_ip2p / "vae" / "config.json", tmp_path / "base" / "vae")
    save_run(tmp_path / "run", tmp_path / "base", {"vae": params}, steps=(3,))
    trained = load_vae(str(tmp_path / "run"))
    assert trained[0] == cfg
    assert_same(trained[1], jax.tree.map(lambda x: x + np.float32(3), params))
    with pytest.raises(FileNotFoundError, match=r"no unet/ inside"):
        load(str(tmp_path / "run"))


@pytest.fixture
def bare(tiny_ip2p, tmp_path) -> Path:
    """A VAE alone, as a folder and as LDM files, in the spelling of the released ones."""
    old = released_names(tiny_ip2p, tmp_path / "old")
    shutil.copytree(old / "vae", tmp_path / "bare" / "folder")
    whole = ldm_state(tiny_ip2p)
    save_file(whole, tmp_path / "bare" / "whole.safetensors")
    prefix = "first_stage_model."
    alone = {n.removeprefix(prefix): x for n, x in whole.items() if n.startswith(prefix)}
    torch.save(
        {"state_dict": alone | {"loss.logvar": torch.ones(())}}, tmp_path / "bare" / "a.ckpt"
    )
    return tmp_path / "bare"


@pytest.mark.parametrize("source", ["folder", "a.ckpt", "whole.safetensors"])
def test_a_vae_alone(tiny_ip2p, tiny_sd, bare, source):
    """The same VAE from each, and in the place of another model's own."""
    want = load(str(tiny_ip2p))
    cfg, params = load_vae(str(bare / source))
    groups = {} if source == "folder" else {"norm_groups": 32, "sample_size": 512}
    assert cfg == dataclasses.replace(want.config.vae, **groups)  # which LDM files do not state
    assert_same(params, want.params["vae"])
    swapped, own = load(str(tiny_sd), vae=str(bare / source)), load(str(tiny_sd))
    assert_same(swapped.params["vae"], params)
    assert swapped.config == dataclasses.replace(own.config, vae=cfg)
    assert_same(swapped.params["unet"], own.params["unet"])


def test_faulty_vaes_alone(bare, tmp_path):
    """Each is one line that names the file; more on them in tests/test_generate.py."""
    state = load_file(bare / "folder" / "diffusion_pytorch_model.safetensors")
    del state["decoder.conv_in.bias"]
    save_file(state, bare / "folder" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match="model.safetensors: 1 tensor missing: decoder.conv_in.bias"
    ):
        load_vae(str(bare / "folder"))
    torch.save({"some.weight": torch.ones(2)}, bare / "other.ckpt")
    line = "other.ckpt: no tensor 'first_stage_model.encoder.*', so no VAE of Stable Diffusion"
    with pytest.raises(ValueError, match=line):
        load_vae(str(bare / "other.ckpt"))
    edit_json(bare / "folder" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match="config.json: _class_name 'AutoencoderTiny' is not supp"):
        load_vae(str(bare / "folder"))


def test_run_directories_with_faults(tiny_ip2p, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tiny_ip2p, tmp_path / "run" / "base")
    with pytest.raises(FileNotFoundError, match="run: no checkpoint under .*/run/checkpoints"):
        load(str(tmp_path / "run"))
    other = load(str(tiny_ip2p)).params["unet"]
    bias = {**other["conv_in"], "bias": np.zeros(31, np.float32)}
    save_run(tmp_path / "other", tiny_ip2p, {"unet": {**other, "conv_in": bias}})
    with pytest.raises(ValueError, match=r"EMA of the unet: .*conv_in.bias \(31,\), expected \(32"):
        load(str(tmp_path / "other"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_faulty_tensors_are_named(folder):
    state = load_file(folder / FILES["unet"])
    state["stray.weight"] = state.pop("conv_out.bias")
    state["conv_in.weight"] = state["conv_in.weight"][:, :4].contiguous()
    save_file(state, folder / FILES["unet"])
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value) == (
        f"{folder / FILES['unet']}: 1 tensor missing: conv_out.bias (4,); "
        "1 tensor unexpected: stray.weight (4,); "
        "1 tensor of another shape: conv_in.weight (32, 4, 3, 3), expected (32, 8, 3, 3)"
    )


def test_missing_text_tensors_are_named_as_the_file_spells_them(tiny_ip2p, tmp_path):
    folder = released_names(tiny_ip2p, tmp_path / "old")
    state = load_file(folder / FILES["text"])
    del state["text_model.final_layer_norm.bias"]
    save_file(state, folder / FILES["text"])
    with pytest.raises(ValueError, match=r"missing: text_model.final_layer_norm.bias \(64,\)$"):
        load(str(folder))


def test_a_folder_without_unet(folder):
    shutil.rmtree(folder / "unet")
    with pytest.raises(FileNotFoundError, match=r"not a diffusers folder \(no unet/ inside\)"):
        load(str(folder))


def test_broken_config(folder):
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="vae/config.json: not JSON"):
        load(str(folder))


def test_truncated_safetensors(folder):
    file = folder / FILES["unet"]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors: not a sound safetensors file"):
        load(str(folder))


def test_sdxl_folder(folder):
    edit_json(folder / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(ValueError, match="unet/config.json: addition_embed_type 'text_time'"):
        load(str(folder))


def test_a_vae_of_another_width(tmp_path):
    folder = tiny_folder(tmp_path, vae={"latent_channels": 16})
    line = r"conv_out.weight \(4, 32, 3, 3\) makes 4 .*post_quant_conv.weight \(16, 16, 1, 1\)"
    with pytest.raises(ValueError, match=line):
        load(str(folder))


def test_a_text_tower_of_another_width(tmp_path):
    folder = tiny_folder(tmp_path, text={"hidden_size": 32})
    with pytest.raises(ValueError, match=r"final_layer_norm.weight \(32,\) makes 32 .* takes 64"):
        load(str(folder))


@pytest.mark.parametrize(
    "name", ["nothing", "./nothing", "a/b/c", "models/x.ckpt", "x.safetensors"]
)
def test_no_such_model(name):
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such file or folder, not a hub id"):
        load(name)
