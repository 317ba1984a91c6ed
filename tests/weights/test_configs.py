# SPDX-License-Identifier: Apache-2.0
"""Claims: config.json means what it means to diffusers; what we lack is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from ip2p_jax.models.presets import SD15, SD21, TINY
from ip2p_jax.weights import configs
from tests import oracles


@pytest.mark.parametrize("preset", [SD15, SD21, TINY, TINY.widened()], ids=str)
def test_json_round_trip(preset):
    unet = json.loads(json.dumps(configs.unet_to_json(preset.unet)))
    vae = json.loads(json.dumps(configs.vae_to_json(preset.vae)))
    text = json.loads(json.dumps(configs.text_to_json(preset.text)))
    assert configs.unet_from_json(unet, "") == preset.unet
    assert configs.vae_from_json(vae, "") == preset.vae
    assert configs.text_from_json(text, "") == preset.text


def test_files_that_diffusers_writes(tiny_ip2p):
    def read(folder: str) -> dict:
        return json.loads((tiny_ip2p / folder / "config.json").read_text())

    want = TINY.widened()
    assert configs.unet_from_json(read("unet"), "") == want.unet
    assert configs.vae_from_json(read("vae"), "") == want.vae
    assert configs.text_from_json(read("text_encoder"), "") == want.text


def test_absent_keys_have_the_defaults_of_the_libraries():
    unet = configs.unet_from_json({}, "")
    with torch.device("meta"):
        default = {**UNet2DConditionModel.from_config({}).config}
    assert unet == configs.unet_from_json(json.loads(json.dumps(default)), "")
    vae = configs.vae_from_json({}, "")
    default = {**AutoencoderKL.from_config({}).config}
    assert vae == configs.vae_from_json(json.loads(json.dumps(default)), "")
    assert configs.text_from_json({}, "") == configs.text_from_json(CLIPTextConfig().to_dict(), "")


def test_sd21_as_released():
    released = {
        **oracles.FULL_UNET,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "use_linear_projection": True,
        "upcast_attention": True,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "num_class_embeds": None,
    }
    assert configs.unet_from_json(json.loads(json.dumps(released)), "") == SD21.unet


def test_one_value_for_all_levels_may_be_a_list():
    unet = configs.unet_to_json(TINY.unet)
    lists = {
        "attention_head_dim": [4, 4, 4],
        "transformer_layers_per_block": [2, 2, 2],
        "layers_per_block": [1, 1, 1],
        "cross_attention_dim": [64, 64, 64],
        "only_cross_attention": [False, False, False],
        "sample_size": [16, 16],
    }
    want = replace(TINY.unet, transformer_layers=2)
    assert configs.unet_from_json({**unet, **lists}, "") == want


UNSUPPORTED_UNET = {
    "act_fn": "gelu",
    "addition_embed_type": "text_time",
    "attention_head_dim": [4, 4],
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "conv_in_kernel": 1,
    "cross_attention_dim": [64, 64, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "dual_cross_attention": True,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": [1, 2, 1],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_class_embeds": 10,
    "only_cross_attention": [True, True, False],
    "resnet_time_scale_shift": "scale_shift",
    "time_cond_proj_dim": 256,
    "time_embedding_type": "fourier",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "an_option_of_the_future": "on",
}
UNSUPPORTED_VAE = {
    "act_fn": "relu",
    "down_block_types": ["AttnDownEncoderBlock2D"] * 3,
    "latents_mean": [0.0] * 4,
    "mid_block_add_attention": False,
    "shift_factor": 0.1,
    "use_quant_conv": False,
    "up_block_types": ["UpDecoderBlock2D"],
}
UNSUPPORTED_TEXT = {"hidden_act": "relu", "layer_norm_eps": 1e-6, "model_type": "t5"}


@pytest.mark.parametrize(
    ("read", "config", "key", "value"),
    [
        (read, config, key, value)
        for read, config, table in (
            (configs.unet_from_json, configs.unet_to_json(TINY.unet), UNSUPPORTED_UNET),
            (configs.vae_from_json, configs.vae_to_json(TINY.vae), UNSUPPORTED_VAE),
            (configs.text_from_json, configs.text_to_json(TINY.text), UNSUPPORTED_TEXT),
        )
        for key, value in table.items()
    ],
)
def test_what_is_not_supported_is_refused_by_name(read, config, key, value):
    assert read(config, "some/config.json")
    with pytest.raises(ValueError, match=f"^some/config.json: .*{key}"):
        read({**config, key: value}, "some/config.json")
