# SPDX-License-Identifier: Apache-2.0
"""How tensors are called: diffusers' names of today, of before, and those of LDM single files.

Our networks use today's diffusers names (the VAE's attention `to_q to_k to_v to_out.0`, the text
tower without `text_model.`). A `Spell` turns such a name into the name that a file uses; reading
looks tensors up by it, writing writes under it, so one table serves both directions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ip2p_jax.models.presets import CLIPConfig, UNetConfig, VAEConfig

Spell = Callable[[str], str]
Table = list[tuple[str, str]]
"""Pairs (prefix in our names, prefix in the file); the first that fits is replaced."""

POSITION_IDS = "embeddings.position_ids"
"""An integer buffer that older text towers carry; no weight."""

OLD_ATTENTION = [
    ("to_q.", "query."),
    ("to_k.", "key."),
    ("to_v.", "value."),
    ("to_out.0.", "proj_attn."),
]
RESNET = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
]
VAE_ATTENTION = [
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
]
CLIP_VISION = [("vision_model.visual_projection.", "visual_projection.")]
"""transformers' projection stands beside the vision tower, ours is a part of it."""

OPEN_CLIP_BLOCK = [
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.", "attn."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
]


@dataclass(frozen=True)
class Names:
    """How a source spelled its tensors, so that an export can spell them alike.

    The defaults are those of the released files: what comes from our runs or from LDM gets them.
    """

    text_prefix: bool = True  # "text_model." before every tensor of the text tower
    position_ids: bool = False  # the text tower's integer buffer
    old_attention: bool = False  # query, key, value, proj_attn in the VAE


def detect(tensors: Mapping[str, Mapping[str, Any]]) -> Names:
    """Reads off how a diffusers folder spells its tensors, given by part ("vae", "text")."""
    text = tensors.get("text", {"text_model.": None})
    return Names(
        text_prefix=any(name.startswith("text_model.") for name in text),
        position_ids=any(name.endswith(POSITION_IDS) for name in text),
        old_attention=any(".proj_attn." in name for name in tensors.get("vae", ())),
    )


def diffusers_spelling(part: str, names: Names) -> Spell:
    """The spelling of "unet", "vae" or "text" in a diffusers folder."""
    if part == "text" and names.text_prefix:
        return lambda name: "text_model." + name
    if part == "vae" and names.old_attention:
        attention = "{}.mid_block.attentions.0."
        table = [
            entry
            for half in ("encoder", "decoder")
            for entry in under(attention.format(half), attention.format(half), OLD_ATTENTION)
        ]
        return lambda name: rename(name, table)
    return lambda name: name


def buffers(part: str, cfg: Any, names: Names) -> dict[str, np.ndarray]:
    """What a diffusers folder holds beside the weights, as its source did."""
    if part == "text" and names.position_ids:
        return {diffusers_spelling(part, names)(POSITION_IDS): np.arange(cfg.positions)[None]}
    return {}


def rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """Replaces the first prefix of the table that fits; a name that none fits stays."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def under(prefix: str, other: str, table: Table) -> Table:
    """The table with a prefix on each side."""
    return [(prefix + a, other + b) for a, b in table]


def unet_table(cfg: UNetConfig) -> Table:
    """LDM numbers the UNet's blocks through; 0 is the residual block, then the transformer."""
    table = [
        ("conv_in.", "input_blocks.0.0."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        *under("mid_block.resnets.0.", "middle_block.0.", RESNET),
        ("mid_block.attentions.0.", "middle_block.1."),
        *under("mid_block.resnets.1.", "middle_block.2.", RESNET),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
    ]
    last, n = len(cfg.channels) - 1, cfg.layers_per_block
    for i in range(last + 1):
        for j in range(n):
            k = i * (n + 1) + j + 1
            table += under(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{k}.0.", RESNET)
            table += [(f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{k}.1.")]
        k = (i + 1) * (n + 1)
        table += [(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{k}.0.op.")]
        for j in range(n + 1):
            k = i * (n + 1) + j
            table += under(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{k}.0.", RESNET)
            if cfg.attention[last - i]:
                table += [(f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{k}.1.")]
        place = f"output_blocks.{i * (n + 1) + n}.{1 + cfg.attention[last - i]}"
        table += [(f"up_blocks.{i}.upsamplers.0.conv.", f"{place}.conv.")]
    return table


def vae_table(cfg: VAEConfig) -> Table:
    """LDM counts the decoder's levels from the highest resolution, diffusers from the lowest."""
    table: Table = []
    last = len(cfg.channels) - 1
    for half in ("encoder", "decoder"):
        table += [
            *((f"{half}.mid_block.resnets.{j}.", f"{half}.mid.block_{j + 1}.") for j in (0, 1)),
            *under(f"{half}.mid_block.attentions.0.", f"{half}.mid.attn_1.", VAE_ATTENTION),
            (f"{half}.conv_norm_out.", f"{half}.norm_out."),
        ]
    for i in range(last + 1):
        down, up = f"encoder.down.{i}.", f"decoder.up.{last - i}."
        for j in range(cfg.layers_per_block + 1):
            resnet, block = f"resnets.{j}.conv_shortcut.", f"block.{j}.nin_shortcut."
            table += [
                (f"encoder.down_blocks.{i}.{resnet}", f"{down}{block}"),
                (f"decoder.up_blocks.{i}.{resnet}", f"{up}{block}"),
            ]
        table += [
            (f"encoder.down_blocks.{i}.downsamplers.0.", f"{down}downsample."),
            (f"encoder.down_blocks.{i}.resnets.", f"{down}block."),
            (f"decoder.up_blocks.{i}.upsamplers.0.", f"{up}upsample."),
            (f"decoder.up_blocks.{i}.resnets.", f"{up}block."),
        ]
    return table


def open_clip_table(layers: int) -> Table:
    """open_clip's text tower, its fused projection of q, k and v taken apart."""
    table = [
        ("embeddings.token_embedding.", "token_embedding."),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("final_layer_norm.", "ln_final."),
    ]
    for i in range(layers):
        table += under(f"encoder.layers.{i}.", f"transformer.resblocks.{i}.", OPEN_CLIP_BLOCK)
    return table


def openai_clip_table(cfg: CLIPConfig) -> Table:
    """OpenAI's CLIP, both towers; projections of q, k and v as in `open_clip_table`."""
    vision, theirs = "vision_model.", "visual."
    table = [
        *under("text_model.", "", open_clip_table(cfg.text.layers)),
        ("text_projection.weight", "text_projection"),
        (f"{vision}embeddings.class_embedding", f"{theirs}class_embedding"),
        (f"{vision}embeddings.patch_embedding.", f"{theirs}conv1."),
        (f"{vision}embeddings.position_embedding.weight", f"{theirs}positional_embedding"),
        (f"{vision}pre_layrnorm.", f"{theirs}ln_pre."),
        (f"{vision}post_layernorm.", f"{theirs}ln_post."),
        (f"{vision}visual_projection.weight", f"{theirs}proj"),
    ]
    for i in range(cfg.vision.layers):
        layer, block = f"{vision}encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
        table += under(layer, block, OPEN_CLIP_BLOCK)
    return table
