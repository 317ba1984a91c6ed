# SPDX-License-Identifier: Apache-2.0
"""Claims: LDM files open with dimensions read off their tensors; EMA weights are chosen; what else
such files carry is dropped by name, and only that."""

import sys
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ip2p_jax.models.presets import SD15, SD21, ModelConfig
from ip2p_jax.weights import ldm
from ip2p_jax.weights.load import PARTS, abstract_part, load
from ip2p_jax.weights.port import leaves, torch_name, torch_shape
from tests.oracles import tiny_folder
from tests.weights.folders import ldm_state

SCHEDULE_BUFFERS = {
    name: torch.linspace(0, 1, 1000)
    for name in (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
        *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("logvar", "first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.weight"),
    )
} | {"scale_factor": torch.tensor(0.18215)}


def fake_file(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of an LDM file of this shape that take no memory."""
    state = {}
    for part in PARTS:
        spell = ldm.spelling(part, cfg)
        state |= ldm.layout(
            part,
            cfg,
            {
                spell(torch_name(path)): np.broadcast_to(
                    np.float32(0), torch_shape(path, leaf.shape)
                )
                for path, leaf in leaves(abstract_part(part, getattr(cfg, part)))
            }
            if part != "text" or not ldm.is_open_clip(cfg.text)
            else {},
            False,
        )
    return state


def open_clip_shapes(cfg: ModelConfig, blocks: int) -> dict[str, np.ndarray]:
    """The text tower of SD 2's files, which have one block more than is used."""
    c, m, prefix = cfg.text.width, cfg.text.mlp_width, ldm.OPEN_CLIP
    shapes = {
        "token_embedding.weight": (cfg.text.vocab_size, c),
        "positional_embedding": (77, c),
        "ln_final.weight": (c,),
        "ln_final.bias": (c,),
        "text_projection": (c, c),
        "logit_scale": (),
    }
    for i in range(blocks):
        block = f"transformer.resblocks.{i}."
        for name, shape in {
            "attn.in_proj": (3 * c, c),
            "attn.out_proj.": (c, c),
            "mlp.c_fc.": (m, c),
            "mlp.c_proj.": (c, m),
            "ln_1.": (c,),
            "ln_2.": (c,),
        }.items():
            joint = "_" if name.endswith("proj") else ""
            shapes[f"{block}{name}{joint}weight"] = shape
            shapes[f"{block}{name}{joint}bias"] = shape[:1]
    return {prefix + n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}


def test_dimensions_of_sd15():
    file = fake_file(SD15.widened())
    assert len([name for name in file if name.startswith(ldm.UNET)]) == 686
    assert ldm.read_config(file, "") == SD15.widened()


def test_dimensions_of_sd21():
    file = fake_file(SD21) | open_clip_shapes(SD21, 24)
    got = ldm.read_config(file, "")
    assert got == replace(SD21, vae=SD15.vae)  # sizes of pictures are not in such a file
    kept = ldm.weights(file)
    spell = ldm.spelling("text", got)
    text = {spell(torch_name(p)) for p, _ in leaves(abstract_part("text", got.text))}
    assert {name for name in kept if name.startswith(ldm.OPEN_CLIP)} == text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of which an LDM file says everything: SD's groups and heads, CLIP's words."""
    return tiny_folder(
        tmp_path_factory.mktemp("ldm"),
        unet={"attention_head_dim": 8, "norm_num_groups": 32},
        vae={"norm_num_groups": 32},
        text={"vocab_size": 49408, "num_attention_heads": 1},
    )


def assert_same_model(got, folder: Path):
    want = load(str(folder))
    unet = replace(want.config.unet, sample_size=got.config.unet.sample_size)
    vae = replace(want.config.vae, sample_size=got.config.vae.sample_size)
    assert got.config == replace(want.config, unet=unet, vae=vae)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_safetensors(folder, tmp_path):
    save_file(ldm_state(folder) | SCHEDULE_BUFFERS, tmp_path / "a.safetensors")
    got = load(str(tmp_path / "a.safetensors"))
    assert_same_model(got, folder)
    assert got.scheduler is None
    assert got.names.position_ids and got.names.text_prefix
    assert got.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_lightning_checkpoint_with_ema(folder, tmp_path, monkeypatch):
    """As the authors' files are: raw and EMA weights, buffers, callbacks, hyper-parameters."""
    state = ldm_state(folder) | SCHEDULE_BUFFERS
    ema = {
        ldm.EMA + name.removeprefix("model.").replace(".", ""): x.clone()
        for name, x in state.items()
        if name.startswith(ldm.UNET)
    }
    for name in (name for name in state if name.startswith(ldm.UNET)):
        state[name] = torch.zeros_like(state[name])
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
        content = {
            "epoch": 9,
            "global_step": 22000,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {callback: {"best_model_score": np.float32(1), "monitor": callback()}},
            "lr_schedulers": [],
            "state_dict": OrderedDict(state | ema),
        }
        torch.save(content, tmp_path / "a.ckpt")
    assert_same_model(load(str(tmp_path / "a.ckpt")), folder)

    torch.save({"state_dict": state}, tmp_path / "raw.ckpt")
    raw = load(str(tmp_path / "raw.ckpt")).params["unet"]
    assert not any(x.any() for _, x in leaves(raw))


def test_sd2_file(tmp_path):
    """Fused projections of open_clip, heads of width 64, linear projections, padding with id 0."""
    folder = tiny_folder(
        tmp_path / "sd2",
        unet={
            "block_out_channels": (64, 64, 128),
            "attention_head_dim": [1, 1, 2],
            "norm_num_groups": 32,
            "use_linear_projection": True,
        },
        vae={"norm_num_groups": 32},
        text={"vocab_size": 49408, "num_attention_heads": 1, "hidden_act": "gelu"},
    )
    state = ldm_state(folder)
    assert f"{ldm.OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight" in state
    extra = {"text_projection": torch.ones(64, 64), "logit_scale": torch.tensor(1.0)}
    extra["transformer.resblocks.23.ln_1.weight"] = torch.ones(64)
    state |= {ldm.OPEN_CLIP + name: x for name, x in extra.items()}
    save_file(state, tmp_path / "a.safetensors")
    got = load(str(tmp_path / "a.safetensors"))
    assert_same_model(got, folder)
    assert got.scheduler is not None and got.scheduler["prediction_type"] == "v_prediction"
    assert got.tokenizer("", padding="max_length").input_ids == [49406, 49407] + [0] * 75


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({ldm.UNET + "out.2.bias": None}, r"1 tensor missing: model.diffusion_model.out.2.bias"),
        ({ldm.VAE + "stray": torch.ones(2)}, r"unexpected: first_stage_model.stray \(2,\)"),
        ({"lora.weight": torch.ones(2)}, "1 tensor unexpected: lora.weight"),
        (
            {ldm.VAE + "quant_conv.bias": torch.ones(3)},
            r"first_stage_model.quant_conv.bias \(3,\), expected \(8,\)",
        ),
        (
            {ldm.UNET + "input_blocks.0.0.weight": None},
            "no tensor 'model.diffusion_model.input_blocks.0.0.weight', so not a Stable Diffusion",
        ),
        ({ldm.EMA + "diffusion_modelout2bias": torch.ones(4)}, r"missing: model_ema.diffusion_mod"),
    ],
)
def test_faults_are_named_as_the_file_spells_them(folder, tmp_path, change, line):
    state = {n: x for n, x in (ldm_state(folder) | change).items() if x is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{line}"):
        load(str(tmp_path / "a.safetensors"))


def test_a_small_vocabulary_is_not_guessed(tiny_ip2p, tmp_path):
    state = ldm_state(tiny_ip2p)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a vocabulary of 1024 entries is not CLIP's 49408"):
        load(str(tmp_path / "a.safetensors"))
