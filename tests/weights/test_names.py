# SPDX-License-Identifier: Apache-2.0
"""Claim: our LDM names are those that diffusers' own converters read, at every size.

Our tensors go out under LDM's names, diffusers' converters bring them back: the same names and
tensors must arrive. On the meta device tensors have shapes and no data: full size costs nothing.
"""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_jax.models.presets import SD15, SD21, TINY, ModelConfig
from ip2p_jax.weights import configs, ldm
from tests.oracles import randomize

pytestmark = pytest.mark.parity

PRESETS = pytest.mark.parametrize(
    ("preset", "device"),
    [(TINY, "cpu"), (SD15, "meta"), (SD21, "meta")],
    ids=["tiny", "sd15", "sd21"],
)


def build(kind: type, preset: ModelConfig, device: str) -> torch.nn.Module:
    """diffusers' own network of this preset, with random weights if on the CPU."""
    with torch.device(device):
        if kind is CLIPTextModel:
            module = CLIPTextModel(CLIPTextConfig(**configs.text_to_json(preset.text)))
        elif kind is UNet2DConditionModel:
            module = kind.from_config(configs.unet_to_json(preset.unet))
        else:
            module = kind.from_config(configs.vae_to_json(preset.vae))
    return randomize(module, 0) if device == "cpu" else module


def spelled(part: str, preset: ModelConfig, state: dict) -> dict:
    """The tensors under LDM's names; open_clip's projections are fused as its files have them."""
    spell = ldm.spelling(part, preset)
    return {spell(name): x for name, x in state.items()}


def assert_same(got: dict, want: dict):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        assert x.is_meta or torch.equal(got[name], x), name


@PRESETS
def test_unet(preset, device):
    model = build(UNet2DConditionModel, preset, device)
    state = model.state_dict()
    got = convert_ldm_unet_checkpoint(spelled("unet", preset, state), model.config)
    assert_same(got, state)


@PRESETS
def test_vae(preset, device):
    model = build(AutoencoderKL, preset, device)
    state = model.state_dict()
    file = spelled("vae", preset, state)
    attention = [name for name in file if ldm.VAE_CONVOLUTIONS.fullmatch(name)]
    assert len(attention) == 8
    for name in attention:
        file[name] = file[name][:, :, None, None]
    assert_same(convert_ldm_vae_checkpoint(file, model.config), state)


@pytest.mark.parametrize(("preset", "device"), [(TINY, "cpu"), (SD15, "meta")])
def test_clip(preset, device):
    state = build(CLIPTextModel, preset, device).state_dict()
    got = convert_ldm_clip_checkpoint(spelled("text", preset, state))
    assert_same({n.removeprefix("text_model."): x for n, x in got.items()}, state)
    assert all(name.startswith("text_model.") for name in got)


def test_open_clip():
    from dataclasses import replace

    preset = replace(TINY, text=replace(TINY.text, activation="gelu"))
    model = build(CLIPTextModel, preset, "cpu")
    state = model.state_dict()
    numpy = {n: x.numpy() for n, x in spelled("text", preset, state).items()}
    file = {n: torch.from_numpy(x) for n, x in ldm.fuse(numpy).items()}
    assert len([name for name in file if "in_proj" in name]) == 2 * preset.text.layers
    got = convert_open_clip_checkpoint(model, file)
    assert_same({n.removeprefix("text_model."): x for n, x in got.items()}, state)


def test_ema_names():
    """As LitEma makes them: the parameter's name within `model`, without its dots."""
    file = {"model_ema.diffusion_modelout2bias": torch.zeros(1).numpy()}
    spell = ldm.spelling("unet", SD15, file)
    assert spell("conv_out.bias") == "model_ema.diffusion_modelout2bias"
    assert (
        spell("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight")
        == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_out0weight"
    )
