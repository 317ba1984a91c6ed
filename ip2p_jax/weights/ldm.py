# SPDX-License-Identifier: Apache-2.0
"""LDM single files: the parts of the model under prefixes, in the names of the original code.

Such a file states no dimensions: they are read off the tensors' shapes, and what shapes do not show
is Stable Diffusion's (32 norm groups, 8 heads in SD 1, heads of width 64 in SD 2). Files that we
write carry everything in their metadata. EMA weights, when present, are the UNet's weights.
"""

import re
from collections.abc import Mapping
from itertools import count

import numpy as np

from ip2p_jax.models.presets import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ip2p_jax.weights.names import (
    POSITION_IDS,
    Spell,
    open_clip_table,
    rename,
    unet_table,
    vae_table,
)

Tensors = Mapping[str, np.ndarray]

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

NOT_WEIGHTS = re.compile(
    r"betas|alphas_.*|sqrt_.*|log_.*|posterior_.*|logvar|lvlb_weights|scale_factor"
    r"|(.*\.)?position_ids|first_stage_model\.loss\..*|model_ema\.(decay|num_updates)"
    r"|cond_stage_model\.model\.(logit_scale|text_projection|attn_mask)"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # SD 2 reads the layer before
)
VAE_CONVOLUTIONS = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
FUSED = re.compile(r"(.*\.attn\.)in_proj_(weight|bias)")
HEAD_WIDTH = 64  # of CLIP's text towers and of SD 2's UNet
GROUPS = 32


def weights(tensors: Tensors) -> dict[str, np.ndarray]:
    """Drops what is not a weight, by name, and the UNet's raw weights where there are EMA ones.

    The fused projections of open_clip are taken apart.
    """
    kept = {name: x for name, x in tensors.items() if not NOT_WEIGHTS.fullmatch(name)}
    if any(name.startswith(EMA) for name in kept):
        kept = {name: x for name, x in kept.items() if not name.startswith(UNET)}
    return unfuse(kept)


def unfuse(tensors: Tensors) -> dict[str, np.ndarray]:
    """Takes the fused projections of CLIP's original code apart into q, k and v."""
    apart = dict(tensors)
    for name, fused in tensors.items():
        if FUSED.fullmatch(name) and fused.ndim and len(fused) % 3 == 0:
            head, _, leaf = name.rpartition("in_proj_")
            for letter, x in zip("qkv", np.split(apart.pop(name), 3), strict=True):
                apart[f"{head}{letter}_proj.{leaf}"] = x
    return apart


def fuse(tensors: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `unfuse`."""
    fused = dict(tensors)
    for name in tensors:
        if re.fullmatch(r".*\.attn\.q_proj\.(weight|bias)", name):
            head, _, leaf = name.rpartition("q_proj.")
            parts = [fused.pop(f"{head}{letter}_proj.{leaf}") for letter in "qkv"]
            fused[f"{head}in_proj_{leaf}"] = np.concatenate(parts)
    return fused


def spelling(part: str, cfg: ModelConfig, tensors: Tensors | None = None) -> Spell:
    """The spelling of "unet", "vae" or "text"; `tensors` are the `weights` of a file to read."""
    tensors = tensors or {}
    if part == "vae":
        return prefixed(VAE, vae_table(cfg.vae))
    if part == "text" and is_open_clip(cfg.text):
        return prefixed(OPEN_CLIP, open_clip_table(cfg.text.layers))
    if part == "text":
        bare = f"{CLIP}embeddings.token_embedding.weight" in tensors
        return prefixed(CLIP if bare else CLIP + "text_model.", [])
    plain = prefixed(UNET, unet_table(cfg.unet))
    if any(name.startswith(EMA) for name in tensors):
        return lambda name: EMA + plain(name).removeprefix("model.").replace(".", "")
    return plain


def prefixed(prefix: str, table: list[tuple[str, str]]) -> Spell:
    return lambda name: prefix + rename(name, table)


def is_open_clip(cfg: TextConfig) -> bool:
    """SD 2's text tower is open_clip's, which computes the exact GELU."""
    return cfg.activation == "gelu"


def prefixes(part: str) -> tuple[str, ...]:
    """Where a file keeps this part."""
    return {"unet": (UNET, EMA), "vae": (VAE,), "text": (CLIP, OPEN_CLIP)}[part]


def layout(part: str, cfg: ModelConfig, tensors: Tensors, position_ids: bool) -> Tensors:
    """The last touch to a part that is written: shapes and buffers as the original code has them.

    The VAE's attention is made of 1x1 convolutions there, and open_clip fuses q, k and v.
    """
    if part == "vae":
        return {
            name: x[:, :, None, None] if VAE_CONVOLUTIONS.fullmatch(name) else x
            for name, x in tensors.items()
        }
    if part == "text" and is_open_clip(cfg.text):
        return fuse(tensors)
    if part == "text" and position_ids:
        ids = np.arange(cfg.text.positions)[None]
        return {**tensors, f"{CLIP}text_model.{POSITION_IDS}": ids}
    return tensors


def read_config(tensors: Tensors, source: str) -> ModelConfig:
    """Reads the dimensions off the shapes of an LDM file's tensors (before `weights`).

    Raises:
      ValueError: names `source` and the tensor without which it is no Stable Diffusion.
    """
    shapes = {name: x.shape for name, x in tensors.items()}
    try:
        text = text_config(shapes)
        unet = unet_config(shapes, is_open_clip(text))
    except KeyError as error:
        raise ValueError(f"{source}: no tensor {error}, so not a Stable Diffusion file") from error
    check_groups(unet.channels, source)
    return ModelConfig(unet, read_vae_config(tensors, source), text)


def read_vae_config(tensors: Tensors, source: str) -> VAEConfig:
    """Reads the dimensions of the VAE; raises as `read_config`."""
    try:
        vae = vae_config({name: x.shape for name, x in tensors.items()})
    except KeyError as error:
        raise ValueError(f"{source}: no tensor {error}, so no VAE of Stable Diffusion") from error
    check_groups(vae.channels, source)
    return vae


def check_groups(widths: tuple[int, ...], source: str) -> None:
    """Refuses widths that GroupNorm cannot divide."""
    for width in widths:
        if width % GROUPS:
            raise ValueError(f"{source}: a width of {width} does not divide into {GROUPS} groups")


def unet_config(shapes: Mapping[str, tuple[int, ...]], is_sd2: bool) -> UNetConfig:
    """Walks down the input blocks: residual blocks, some with a transformer, and downsamplings."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for i in count(1):
        block = f"{UNET}input_blocks.{i}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        elif f"{block}0.in_layers.2.weight" in shapes:
            width = shapes[f"{block}0.in_layers.2.weight"][0]
            levels[-1].append((width, f"{block}1.norm.weight" in shapes))
        else:
            break
    middle = f"{UNET}middle_block.1."
    channels = tuple(level[-1][0] for level in levels if level)
    if not channels:
        raise KeyError(f"{UNET}input_blocks.1.0.in_layers.2.weight")
    depth = count_up(shapes, middle + "transformer_blocks.{}.norm1.weight")
    return UNetConfig(
        in_channels=shapes[f"{UNET}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{UNET}out.2.weight"][0],
        channels=channels,
        attention=tuple(level[-1][1] for level in levels if level),
        heads=tuple(c // HEAD_WIDTH if is_sd2 else 8 for c in channels),
        layers_per_block=len(levels[0]),
        transformer_layers=depth,
        context_dim=shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=len(shapes[f"{middle}proj_in.weight"]) == 2,
        sample_size=96 if is_sd2 else 64,
    )


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """Counts the encoder's levels and their residual blocks."""
    down = VAE + "encoder.down."
    levels = count_up(shapes, down + "{}.block.0.conv1.weight")
    if not levels:
        raise KeyError(down + "0.block.0.conv1.weight")
    return VAEConfig(
        latent_channels=shapes[f"{VAE}post_quant_conv.weight"][0],
        channels=tuple(shapes[f"{down}{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=count_up(shapes, down + "0.block.{}.conv1.weight"),
    )


def text_config(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    """CLIP's tower as transformers names it (SD 1), or open_clip's (SD 2)."""
    if f"{OPEN_CLIP}token_embedding.weight" in shapes:
        vocab, width = shapes[f"{OPEN_CLIP}token_embedding.weight"]
        block = OPEN_CLIP + "transformer.resblocks.{}."
        positions = shapes[f"{OPEN_CLIP}positional_embedding"][0]
        mlp = shapes[block.format(0) + "mlp.c_fc.weight"][0]
        layers, activation = min(count_up(shapes, block + "ln_1.weight"), 23), "gelu"
    else:
        bare = f"{CLIP}embeddings.token_embedding.weight" in shapes
        tower = CLIP if bare else CLIP + "text_model."
        block = tower + "encoder.layers.{}."
        vocab, width = shapes[f"{tower}embeddings.token_embedding.weight"]
        positions = shapes[f"{tower}embeddings.position_embedding.weight"][0]
        mlp = shapes[block.format(0) + "mlp.fc1.weight"][0]
        layers, activation = count_up(shapes, block + "layer_norm1.weight"), "quick_gelu"
    return TextConfig(
        vocab_size=vocab,
        width=width,
        layers=layers,
        heads=max(1, width // HEAD_WIDTH),
        mlp_width=mlp,
        positions=positions,
        activation=activation,
    )


def count_up(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """How many of the names with 0, 1, 2 ... in place of `{}` there are in a row."""
    return next(i for i in count() if name.format(i) not in shapes)
