# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights, written by torch, diffusers and transformers: the oracle's side.

The weights are drawn so that parity tests are sensitive: matrices keep the variance of their input,
norms have scales and biases of their own, no bias is zero.
"""

import json
import warnings
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLIP_TOKENIZER = Path(__file__).parent.parent / "ip2p_jax" / "assets" / "clip_tokenizer"

TINY_UNET = dict(
    sample_size=16,
    out_channels=4,
    block_out_channels=(32, 64, 96),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=64,
    norm_num_groups=16,
)
TINY_VAE = dict(
    sample_size=64,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=16,
)
TINY_TEXT = dict(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=0,
    eos_token_id=2,
)
FULL_UNET = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    attention_head_dim=8,
    cross_attention_dim=768,
)
FULL_VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
FULL_TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    bos_token_id=0,
    eos_token_id=2,
)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter of `module` anew and returns it, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(generator=generator)
            if p.ndim == 1:
                p.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
            elif p.ndim > 1 and "embedding.weight" not in name:
                p.div_(p[0].numel() ** 0.5)
    return module.eval()


def small_tokenizer(size: int = 1024, **options) -> CLIPTokenizer:
    """CLIP's tokenizer cut to its `size` first entries: bytes, first merges, start and end."""
    vocab = json.loads((CLIP_TOKENIZER / "vocab.json").read_text("utf-8"))
    lines = (CLIP_TOKENIZER / "merges.txt").read_text("utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines[: size - 2 - 512]]
    words = [*list(vocab)[: size - 2], "<|startoftext|>", "<|endoftext|>"]
    table = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(table, merges, model_max_length=77, **options)


def pipeline(unet: dict, vae: dict, text: dict, tokenizer: CLIPTokenizer, seed: int, scheduler):
    """Builds diffusers' InstructPix2Pix pipeline with random weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler = scheduler or EulerAncestralDiscreteScheduler(**SCHEDULE)
    return StableDiffusionInstructPix2PixPipeline(
        vae=randomize(AutoencoderKL(**vae), seed + 1),
        text_encoder=randomize(CLIPTextModel(CLIPTextConfig(**text)), seed + 2),
        tokenizer=tokenizer,
        unet=randomize(UNet2DConditionModel(**unet), seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_folder(
    path: str | Path,
    in_channels: int = 8,
    seed: int = 0,
    *,
    unet: dict | None = None,
    vae: dict | None = None,
    text: dict | None = None,
    tokenizer: dict | None = None,
    scheduler=None,
    dtype: torch.dtype = torch.float32,
    **save_options,
) -> Path:
    """Writes a diffusers folder in the shape of `presets.TINY`, random weights; returns its path.

    `unet`, `vae`, `text` replace entries of the configurations, `tokenizer` gives options of the
    tokenizer (e.g. `pad_token="!"`), `scheduler` is a diffusers scheduler. The weights are drawn in
    float32 and stored as `dtype`. The rest goes to `save_pretrained` (e.g. `variant="fp16"`).
    """
    pipe = pipeline(
        {**TINY_UNET, "in_channels": in_channels, **(unet or {})},
        {**TINY_VAE, **(vae or {})},
        {**TINY_TEXT, **(text or {})},
        small_tokenizer(**(tokenizer or {})),
        seed,
        scheduler,
    )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(part, dtype)
    pipe.save_pretrained(path, **save_options)
    return Path(path)


def full_folder(
    path: str | Path, in_channels: int = 8, seed: int = 0, scheduler=None, unet: dict | None = None
) -> Path:
    """Writes a diffusers folder in full SD 1.5 shape (4.3 GB); returns its path.

    `unet` replaces entries of the UNet's configuration.
    """
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER, model_max_length=77)
    unet = {**FULL_UNET, "in_channels": in_channels, **(unet or {})}
    pipeline(unet, FULL_VAE, FULL_TEXT, tokenizer, seed, scheduler).save_pretrained(path)
    return Path(path)


TINY_CLIP_VISION = dict(
    image_size=32,
    patch_size=8,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    projection_dim=48,
)


def clip_folder(
    path: str | Path, text: dict, vision: dict, tokenizer: CLIPTokenizer, seed: int = 0
) -> Path:
    """Writes transformers' CLIPModel with random weights, and its tokenizer; returns its path."""
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=vision["projection_dim"]
    )
    randomize(CLIPModel(config), seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def tiny_clip(path: str | Path, seed: int = 0) -> Path:
    """A CLIP of two layers a tower, for pictures of 32 px."""
    return clip_folder(path, TINY_TEXT, TINY_CLIP_VISION, small_tokenizer(), seed)


def full_clip(path: str | Path, seed: int = 0) -> Path:
    """A CLIP in the shape of ViT-L/14 (1.7 GB)."""
    vision = dict(
        image_size=224,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=768,
    )
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER, model_max_length=77)
    return clip_folder(path, FULL_TEXT, vision, tokenizer, seed)
