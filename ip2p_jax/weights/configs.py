# SPDX-License-Identifier: Apache-2.0
"""Our dimensions from and to the `config.json` files of diffusers and transformers.

A key that is absent has the library's default. What our networks do not compute is refused by name;
keys that change nothing (sample sizes, dropout, versions) are accepted.
"""

from collections.abc import Mapping
from typing import Any

from ip2p_jax.models.presets import CLIPConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig

Json = dict[str, Any]

UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
UNET_READ = {
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}
UNET_INERT = ("addition_embed_type_num_heads", "addition_time_embed_dim", "dropout")
UNET_BLOCKS = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}
VAE_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
VAE_READ = {
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ("UpDecoderBlock2D",),
}
TEXT_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
TEXT_READ = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
VISION_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_channels": 3}
VISION_READ = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
INERT = ("upcast_attention", "force_upcast", "quantization_config")


def read(config: Json, source: str, known: Mapping, fixed: Mapping) -> Json:
    """Returns the values of `known` (with its defaults); refuses what differs from `fixed`."""
    for key, want in fixed.items():
        got = config.get(key, want)
        if got != want and not (isinstance(got, list) and got and set(got) == {want}):
            raise ValueError(f"{source}: {key} {got!r} is not supported, only {want!r}")
    return {key: config.get(key, default) for key, default in known.items()}


def refuse_unknown(config: Json, source: str, known: set[str]) -> None:
    """Refuses keys that nobody here has heard of, unless they are switched off."""
    for key, value in config.items():
        if not key.startswith("_") and key not in known and value not in (None, False):
            raise ValueError(f"{source}: option {key} = {value!r} is not known here")


def per_level(value: Any, levels: int, source: str, key: str) -> tuple:
    """One value for each level, from one for all or from a list."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"{source}: {key} has {len(values)} entries for {levels} levels")
    return values


def single(value: Any, levels: int, source: str, key: str) -> Any:
    """The value that all levels share."""
    values = per_level(value, levels, source, key)
    if len(set(values)) != 1:
        raise ValueError(f"{source}: {key} {value} differs between levels, which is not supported")
    return values[0]


def block_kinds(types: Any, kinds: Mapping, levels: int, source: str, key: str) -> tuple:
    """What `kinds` says of every block type."""
    for name in per_level(types, levels, source, key):
        if name not in kinds:
            raise ValueError(f"{source}: {key} {name} is not supported, only {', '.join(kinds)}")
    return tuple(kinds[name] for name in types)


def unet_from_json(config: Json, source: str) -> UNetConfig:
    """Reads diffusers' `UNet2DConditionModel`; `attention_head_dim` is the number of heads there.

    Raises:
      ValueError: names `source` and the key that is not supported.
    """
    got = read(config, source, UNET_READ, UNET_FIXED)
    refuse_unknown(config, source, {*UNET_FIXED, *UNET_READ, *UNET_INERT, *INERT})
    channels = tuple(got["block_out_channels"])
    n = len(channels)
    down = block_kinds(got["down_block_types"], UNET_BLOCKS, n, source, "down_block_types")
    up = block_kinds(got["up_block_types"], UNET_BLOCKS, n, source, "up_block_types")
    if up != down[::-1]:
        raise ValueError(f"{source}: up_block_types do not mirror down_block_types")

    def one(key: str) -> Any:
        return single(got[key], n, source, key)

    return UNetConfig(
        in_channels=got["in_channels"],
        out_channels=got["out_channels"],
        channels=channels,
        attention=down,
        heads=per_level(got["attention_head_dim"], n, source, "attention_head_dim"),
        layers_per_block=one("layers_per_block"),
        transformer_layers=one("transformer_layers_per_block"),
        context_dim=one("cross_attention_dim"),
        norm_groups=got["norm_num_groups"],
        linear_projection=got["use_linear_projection"],
        sample_size=single(got["sample_size"] or UNetConfig.sample_size, 2, source, "sample_size"),
    )


def unet_to_json(cfg: UNetConfig) -> Json:
    """Writes diffusers' configuration of this UNet."""
    down = [("Down", "CrossAttnDown")[with_text] + "Block2D" for with_text in cfg.attention]
    up = [("Up", "CrossAttnUp")[with_text] + "Block2D" for with_text in cfg.attention[::-1]]
    heads = cfg.heads[0] if len(set(cfg.heads)) == 1 else list(cfg.heads)
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": list(cfg.channels),
        "center_input_sample": False,
        "cross_attention_dim": cfg.context_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": cfg.in_channels,
        "layers_per_block": cfg.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": cfg.norm_groups,
        "out_channels": cfg.out_channels,
        "sample_size": cfg.sample_size,
        "transformer_layers_per_block": cfg.transformer_layers,
        "up_block_types": up,
        "use_linear_projection": cfg.linear_projection,
    }


def vae_from_json(config: Json, source: str) -> VAEConfig:
    """Reads diffusers' `AutoencoderKL`; raises as `unet_from_json`."""
    got = read(config, source, VAE_READ, VAE_FIXED)
    refuse_unknown(config, source, {*VAE_FIXED, *VAE_READ, *INERT})
    channels = tuple(got["block_out_channels"])
    for key, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        block_kinds(got[key], {kind: None}, len(channels), source, key)
    return VAEConfig(
        latent_channels=got["latent_channels"],
        channels=channels,
        layers_per_block=got["layers_per_block"],
        norm_groups=got["norm_num_groups"],
        scaling_factor=got["scaling_factor"],
        sample_size=single(got["sample_size"], 2, source, "sample_size"),
    )


def vae_to_json(cfg: VAEConfig) -> Json:
    """Writes diffusers' configuration of this autoencoder."""
    n = len(cfg.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(cfg.channels),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "in_channels": 3,
        "latent_channels": cfg.latent_channels,
        "layers_per_block": cfg.layers_per_block,
        "norm_num_groups": cfg.norm_groups,
        "out_channels": 3,
        "sample_size": cfg.sample_size,
        "scaling_factor": cfg.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }


def text_from_json(config: Json, source: str) -> TextConfig:
    """Reads transformers' `CLIPTextModel`; its files carry many generic keys, which are inert.

    Raises:
      ValueError: names `source` and what is not supported.
    """
    got = read(config, source, TEXT_READ, TEXT_FIXED)
    if got["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ValueError(f"{source}: hidden_act {got['hidden_act']} is not quick_gelu or gelu")
    if not isinstance(got["eos_token_id"], int):
        raise ValueError(f"{source}: eos_token_id {got['eos_token_id']!r} is not one token id")
    return TextConfig(
        vocab_size=got["vocab_size"],
        width=got["hidden_size"],
        layers=got["num_hidden_layers"],
        heads=got["num_attention_heads"],
        mlp_width=got["intermediate_size"],
        positions=got["max_position_embeddings"],
        activation=got["hidden_act"],
        bos_token_id=got["bos_token_id"],
        eos_token_id=got["eos_token_id"],
        pad_token_id=got["pad_token_id"],
    )


def text_to_json(cfg: TextConfig) -> Json:
    """Writes transformers' configuration of this text tower."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,
        "hidden_act": cfg.activation,
        "hidden_size": cfg.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": cfg.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": cfg.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.layers,
        "pad_token_id": cfg.pad_token_id,
        "projection_dim": cfg.width,
        "vocab_size": cfg.vocab_size,
    }


def vision_from_json(config: Json, source: str) -> VisionConfig:
    """Reads the vision tower of transformers' `CLIPConfig`, whose generic keys are inert.

    Older files state it as `vision_config_dict` too, which then holds alone.

    Raises:
      ValueError: names `source` and what is not supported.
    """
    vision = config.get("vision_config_dict") or config.get("vision_config") or {}
    got = read(vision, source, VISION_READ, VISION_FIXED)
    if got["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ValueError(f"{source}: hidden_act {got['hidden_act']} is not quick_gelu or gelu")
    return VisionConfig(
        image_size=single(got["image_size"], 2, source, "image_size"),
        patch_size=single(got["patch_size"], 2, source, "patch_size"),
        width=got["hidden_size"],
        layers=got["num_hidden_layers"],
        heads=got["num_attention_heads"],
        mlp_width=got["intermediate_size"],
        projection_dim=config.get("projection_dim", 512),
        activation=got["hidden_act"],
    )


def vision_to_json(cfg: VisionConfig) -> Json:
    """Writes transformers' configuration of this vision tower."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": cfg.activation,
        "hidden_size": cfg.width,
        "image_size": cfg.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": cfg.mlp_width,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "num_hidden_layers": cfg.layers,
        "patch_size": cfg.patch_size,
        "projection_dim": cfg.projection_dim,
    }


def clip_from_json(config: Json, source: str) -> CLIPConfig:
    """Reads transformers' `CLIPConfig`, both towers; raises as `vision_from_json`.

    Older files state the text tower as `text_config_dict` too, which then holds alone.
    """
    read(config, source, {}, {"model_type": "clip"})
    text = config.get("text_config_dict") or config.get("text_config") or {}
    return CLIPConfig(text_from_json(text, source), vision_from_json(config, source))


def clip_to_json(cfg: CLIPConfig) -> Json:
    """Writes transformers' configuration of both towers."""
    space = {"projection_dim": cfg.vision.projection_dim}
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "text_config": text_to_json(cfg.text) | space,
        "vision_config": vision_to_json(cfg.vision),
    } | space
