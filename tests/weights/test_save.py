# SPDX-License-Identifier: Apache-2.0
"""Claims: exports are exact, spelled as their source, and diffusers' own pipelines open them."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from ip2p_jax.weights.load import load
from ip2p_jax.weights.save import save_diffusers, save_ldm, size
from tests.oracles import tiny_folder
from tests.weights.folders import FILES, ldm_state, released_names, same, tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning:diffusers"
)


@pytest.mark.parametrize("generation", ["today", "released"])
def test_diffusers_round_trip(tiny_ip2p, tmp_path, generation):
    source = tiny_ip2p
    if generation == "released":
        source = released_names(tiny_ip2p, tmp_path / "source")
    counts = []
    save_diffusers(load(str(source)), tmp_path / "out", progress=counts.append)
    want = tensors(source)
    for part, got in tensors(tmp_path / "out").items():
        assert same(got, want[part]), part
    again = load(str(tmp_path / "out"))
    assert again.config == load(str(source)).config
    assert again.scheduler == load(str(source)).scheduler
    text = "turn it RED, please"
    assert again.tokenizer(text).input_ids == load(str(source)).tokenizer(text).input_ids
    assert sum(counts) == sum(
        x.numel() * x.element_size() for part in want.values() for x in part.values()
    )


def test_ldm_round_trip(tiny_ip2p, tmp_path):
    """ldm -> ours -> ldm; the text tower's buffer included, CLIP's vocabulary or not."""
    model = replace(load(str(tiny_ip2p)), scheduler=None)
    save_ldm(model, tmp_path / "a.safetensors")
    first = load_file(tmp_path / "a.safetensors")
    state = ldm_state(tiny_ip2p)
    state.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert same(first, state)
    again = load(str(tmp_path / "a.safetensors"))
    assert again.config == model.config and again.scheduler is None
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer("make it blue").input_ids == model.tokenizer("make it blue").input_ids
    save_ldm(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"], ids=["sd1", "sd2"])
def test_ldm_files_of_others_round_trip(tmp_path, activation):
    wide = {"block_out_channels": (64, 64, 128), "attention_head_dim": [1, 1, 2]}
    sd2 = activation == "gelu"
    unet = {"norm_num_groups": 32, "attention_head_dim": 8, "use_linear_projection": sd2}
    folder = tiny_folder(
        tmp_path / "folder",
        unet=unet | (wide if sd2 else {}),
        vae={"norm_num_groups": 32},
        text={"vocab_size": 49408, "num_attention_heads": 1, "hidden_act": activation},
    )
    state = ldm_state(folder)
    save_file(state, tmp_path / "a.safetensors")
    save_ldm(load(str(tmp_path / "a.safetensors")), tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "b.safetensors"), state)


def test_what_comes_from_ldm_gets_the_released_names(tiny_ip2p, tmp_path):
    save_ldm(load(str(tiny_ip2p)), tmp_path / "a.safetensors")
    save_diffusers(load(str(tmp_path / "a.safetensors")), tmp_path / "out")
    want, got = tensors(tiny_ip2p), tensors(tmp_path / "out")
    assert same(got["unet"], want["unet"]) and same(got["vae"], want["vae"])
    assert same(got["text"], {"text_model." + n: x for n, x in want["text"].items()})


@pytest.mark.parity
@pytest.mark.parametrize("generation", ["today", "released"])
def test_diffusers_opens_the_export(tiny_ip2p, tmp_path, generation):
    """Its networks compute what the source's compute; another model's do not."""
    source = tiny_ip2p
    if generation == "released":
        source = released_names(tiny_ip2p, tmp_path / "source")
    save_diffusers(load(str(source)), tmp_path / "out")
    pipes = [
        StableDiffusionInstructPix2PixPipeline.from_pretrained(path, safety_checker=None)
        for path in (source, tmp_path / "out", tiny_folder(tmp_path / "other", seed=1))
    ]
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 3, 64, 64)
    ids, exported_ids, _ = (
        pipe.tokenizer("make it black", padding="max_length", return_tensors="pt").input_ids
        for pipe in pipes
    )
    assert torch.equal(exported_ids, ids)
    with torch.no_grad():
        text = [pipe.text_encoder(ids).last_hidden_state for pipe in pipes]
        noise = [pipe.unet(z, 500, text[0]).sample for pipe in pipes]
        latent = [pipe.vae.encode(x).latent_dist.mean for pipe in pipes]
    for source_result, exported, other in (text, noise, latent):
        assert (exported - source_result).abs().max() <= 1e-5 * source_result.abs().max()
        assert not torch.allclose(other, source_result, atol=0.1)
    assert pipes[1].scheduler.config["beta_schedule"] == "scaled_linear"


@pytest.mark.parity
def test_diffusers_opens_what_was_an_ldm_file(tiny_sd, tmp_path):
    model = load(str(tiny_sd))
    save_ldm(replace(model, scheduler=None), tmp_path / "a.safetensors")
    save_diffusers(load(str(tmp_path / "a.safetensors")), tmp_path / "out")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    want = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").state_dict()
    assert same(dict(pipe.text_encoder.state_dict()), dict(want))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(tiny_ip2p, tmp_path, dtype):
    model = load(str(tiny_ip2p))
    save_diffusers(model, tmp_path / "out", dtype=dtype)
    want = tensors(tiny_ip2p)
    for part, got in tensors(tmp_path / "out").items():
        assert {x.dtype for x in got.values()} == {getattr(torch, dtype)}
        rounded = {n: x.to(getattr(torch, dtype)).float() for n, x in want[part].items()}
        assert same({n: x.float() for n, x in got.items()}, rounded)
    written = sum((tmp_path / "out" / file).stat().st_size for file in FILES.values())
    assert 0.95 * written < size(model, dtype) < written


def test_parts_without_parameters_get_their_configuration_only(tiny_ip2p, tmp_path):
    model = load(str(tiny_ip2p))
    frozen = {part: x for part, x in model.params.items() if part != "unet"}
    save_diffusers(replace(model, params=frozen), tmp_path / "base")
    assert [path.name for path in (tmp_path / "base" / "unet").iterdir()] == ["config.json"]
    assert (tmp_path / "base" / FILES["vae"]).is_file()


def test_jax_arrays_are_written_too(tiny_ip2p, tmp_path):
    model = load(str(tiny_ip2p))
    save_diffusers(replace(model, params=jax.device_put(model.params)), tmp_path / "out")
    assert same(tensors(tmp_path / "out")["unet"], tensors(tiny_ip2p)["unet"])


def test_the_safety_checker_goes_along(tiny_ip2p, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_ip2p, source)
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        (source / name).parent.mkdir()
        (source / name).write_bytes(name.encode())
    save_diffusers(load(str(source)), tmp_path / "out")
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == name.encode()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"


def test_existing_paths_are_kept(tiny_ip2p, tmp_path):
    model = load(str(tiny_ip2p))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is already there"):
        save_diffusers(model, tmp_path / "out")
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="a.safetensors is already there"):
        save_ldm(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors"):
        save_ldm(model, tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_failed_export(tiny_ip2p, tmp_path):
    model = load(str(tiny_ip2p))
    huge = jax.tree.map(lambda x: np.full_like(x, 1e6), model.params["vae"])
    broken = replace(model, params={**model.params, "vae": huge})
    with pytest.raises(ValueError, match="beyond the range of float16"):
        save_diffusers(broken, tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="beyond the range of float16"):
        save_ldm(broken, tmp_path / "out.safetensors", dtype="float16")
    assert not list(tmp_path.iterdir())
