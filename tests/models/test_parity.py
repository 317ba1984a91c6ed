# SPDX-License-Identifier: Apache-2.0
"""UNet, VAE and CLIP text equal diffusers and transformers on torch, small and in SD 1.5's size.

Random weights forgive much, so each claim has controls: the same comparison with one detail wrong
must miss the tolerance.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from flax import nnx
from transformers import CLIPTextConfig, CLIPTextModel

from ip2p_jax.models import attention
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import SD15, SD21, TINY, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.weights.port import from_torch
from tests.oracles import (
    FULL_TEXT,
    FULL_UNET,
    FULL_VAE,
    TINY_TEXT,
    TINY_UNET,
    TINY_VAE,
    randomize,
)

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4


def error(ours, theirs) -> float:
    """Maximum error relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def ported(network, cfg, module: torch.nn.Module):
    """(graphdef, parameters) of our network with torch's weights."""
    graphdef, params = abstract(network, cfg)
    return graphdef, from_torch(params, {k: v.numpy() for k, v in module.state_dict().items()})


def run(network, cfg, params, *args, method="__call__"):
    graphdef, _ = abstract(network, cfg)
    call = jax.jit(lambda p, *a: getattr(nnx.merge(graphdef, p), method)(*a))
    return call(params, *map(jnp.asarray, args))


def unet_inputs(cfg: UNetConfig, size: tuple[int, int], rows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, *size, cfg.in_channels), np.float32)
    t = np.linspace(17.25, 980.5, rows, dtype=np.float32)
    text = rng.standard_normal((rows, 77, cfg.context_dim), np.float32)
    return z, t, text


def torch_unet(module: UNet2DConditionModel, z, t, text) -> np.ndarray:
    with torch.no_grad():
        z, t, text = (torch.from_numpy(x) for x in (z, t, text))
        return nhwc(module(z.permute(0, 3, 1, 2), t, text).sample)


SD2_UNET = {**TINY_UNET, "attention_head_dim": [2, 4, 6], "use_linear_projection": True}
WIDE_UNET = {
    **TINY_UNET,
    "block_out_channels": (48, 96),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 40,
    "transformer_layers_per_block": 2,
}
UNETS = {
    "tiny": (TINY_UNET, TINY.widened().unet),
    "sd2-like": (
        SD2_UNET,
        replace(TINY.widened().unet, heads=(2, 4, 6), linear_projection=True),
    ),
    "wider, deeper, two levels": (
        WIDE_UNET,
        UNetConfig(
            in_channels=8,
            channels=(48, 96),
            attention=(True, False),
            heads=(4, 4),
            context_dim=40,
            transformer_layers=2,
            norm_groups=16,
        ),
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    theirs, cfg = UNETS[name]
    module = randomize(UNet2DConditionModel(**theirs, in_channels=8), 0)
    inputs = unet_inputs(cfg, (16, 24), rows=3)
    expected = torch_unet(module, *inputs)
    _, params = ported(UNet, cfg, module)
    assert error(run(UNet, cfg, params, *inputs), expected) < TOLERANCE


@pytest.fixture(scope="module")
def tiny_unet():
    cfg = TINY.widened().unet
    module = randomize(UNet2DConditionModel(**TINY_UNET, in_channels=8), 0)
    inputs = unet_inputs(cfg, (16, 16), rows=2)
    return cfg, ported(UNet, cfg, module)[1], inputs, torch_unet(module, *inputs)


def test_unet_control_tanh_gelu(tiny_unet, monkeypatch):
    cfg, params, inputs, expected = tiny_unet
    monkeypatch.setattr(attention, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    assert error(run(UNet, cfg, params, *inputs), expected) > TOLERANCE


@pytest.mark.parametrize("wrong", ["t", "text", "channels"])
def test_unet_control_inputs(tiny_unet, wrong):
    """A timestep off by one, another text, or swapped latents are seen."""
    cfg, params, (z, t, text), expected = tiny_unet
    changed = {
        "t": (z, t + 1, text),
        "text": (z, t, text[::-1]),
        "channels": (np.roll(z, 4, axis=-1), t, text),
    }[wrong]
    assert error(run(UNet, cfg, params, *changed), expected) > 10 * TOLERANCE


def test_unet_control_group_norm_eps(tiny_unet, monkeypatch):
    """1e-6 instead of 1e-5 in the residual blocks is seen on a quiet input."""
    from ip2p_jax.models import layers

    cfg, _, _, _ = tiny_unet
    module = randomize(UNet2DConditionModel(**TINY_UNET, in_channels=8), 0)
    with torch.no_grad():
        module.conv_in.weight.mul_(1e-2)
        module.conv_in.bias.mul_(1e-2)
    inputs = unet_inputs(cfg, (16, 16), rows=1)
    expected = torch_unet(module, *inputs)
    _, params = ported(UNet, cfg, module)
    assert error(run(UNet, cfg, params, *inputs), expected) < TOLERANCE
    rsqrt = jax.lax.rsqrt
    monkeypatch.setattr(layers.jax.lax, "rsqrt", lambda x: rsqrt(x - 9e-6))
    assert error(run(UNet, cfg, params, *inputs), expected) > TOLERANCE


def vae_pair(theirs: dict, cfg: VAEConfig):
    module = randomize(AutoencoderKL(**theirs), 1)
    return module, ported(VAE, cfg, module)[1]


def vae_errors(module, cfg, params, size: tuple[int, int]) -> tuple[float, float, float]:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = module.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
        picture = module.decode(posterior.mean).sample
    ours = run(VAE, cfg, params, x, method="encode")
    decoded = run(VAE, cfg, params, nhwc(posterior.mean), method="decode")
    return (
        error(ours.mean, nhwc(posterior.mean)),
        error(ours.log_var, nhwc(posterior.logvar)),
        error(decoded, nhwc(picture)),
    )


def test_vae():
    module, params = vae_pair(TINY_VAE, TINY.vae)
    assert max(vae_errors(module, TINY.vae, params, (48, 80))) < TOLERANCE


def test_vae_control_padding(monkeypatch):
    """The encoder's (0, 1) padding matters: padding the other side is seen."""
    module, params = vae_pair(TINY_VAE, TINY.vae)
    conv = jax.lax.conv_general_dilated

    def flipped(x, kernel, *, padding, **options):
        return conv(x, kernel, padding=tuple(p[::-1] for p in padding), **options)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", flipped)
    assert vae_errors(module, TINY.vae, params, (48, 80))[0] > 10 * TOLERANCE


def text_pair(theirs: dict, cfg: TextConfig):
    module = randomize(CLIPTextModel(CLIPTextConfig(**theirs)), 2)
    return module, ported(CLIPText, cfg, module)[1]


def text_error(module, cfg, params) -> float:
    tokens = np.random.default_rng(2).integers(0, cfg.vocab_size, (2, 77)).astype(np.int32)
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    return error(run(CLIPText, cfg, params, tokens), expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text(activation):
    cfg = replace(TINY.text, activation=activation)
    module, params = text_pair({**TINY_TEXT, "hidden_act": activation}, cfg)
    assert text_error(module, cfg, params) < TOLERANCE
    other = replace(cfg, activation={"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation])
    assert text_error(module, other, params) > TOLERANCE


@pytest.mark.parametrize(
    "model, counts",
    [
        (SD15, (859_520_964, 83_653_863, 123_060_480)),
        (SD15.widened(), (859_532_484, 83_653_863, 123_060_480)),
        (SD21, (865_910_724, 83_653_863, 340_387_840)),
    ],
)
def test_sizes(model: ModelConfig, counts):
    """The presets have the published numbers of parameters; the UNet of SD 1.5 has 686 tensors."""
    networks = ((UNet, model.unet), (VAE, model.vae), (CLIPText, model.text))
    trees = [jax.tree.leaves(abstract(network, cfg)[1]) for network, cfg in networks]
    assert tuple(sum(x.size for x in leaves) for leaves in trees) == counts
    assert len(trees[0]) == 686


@pytest.mark.slow
@pytest.mark.heavy
def test_full_unet():
    """SD 1.5's UNet with 8 channels at 256 px, one row."""
    cfg = SD15.widened().unet
    module = randomize(UNet2DConditionModel(**FULL_UNET, in_channels=8), 0)
    inputs = unet_inputs(cfg, (32, 32), rows=1)
    expected = torch_unet(module, *inputs)
    _, params = ported(UNet, cfg, module)
    assert error(run(UNet, cfg, params, *inputs), expected) < TOLERANCE
    z, t, text = inputs
    assert error(run(UNet, cfg, params, z, t + 1, text), expected) > TOLERANCE


@pytest.mark.slow
@pytest.mark.heavy
def test_full_vae():
    """SD's VAE, both ways, on a picture that is not square."""
    module, params = vae_pair(FULL_VAE, SD15.vae)
    assert max(vae_errors(module, SD15.vae, params, (192, 256))) < TOLERANCE


@pytest.mark.slow
@pytest.mark.heavy
def test_full_text():
    """CLIP ViT-L/14's text tower."""
    module, params = text_pair(FULL_TEXT, SD15.text)
    assert text_error(module, SD15.text, params) < TOLERANCE
    assert text_error(module, replace(SD15.text, activation="gelu"), params) > TOLERANCE
