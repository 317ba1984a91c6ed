# SPDX-License-Identifier: Apache-2.0
"""Dimensions of the networks, and presets: SD15, SD21, TINY; CLIP_L14, CLIP_B32, CLIP_B16."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class UNetConfig:
    """Latent UNet with cross-attention (diffusers' `UNet2DConditionModel`).

    `attention[i]` says whether level i has transformers, `heads[i]` how many heads they have.
    diffusers writes the number of heads as `attention_head_dim`.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    transformer_layers: int = 1
    context_dim: int = 768
    norm_groups: int = 32
    linear_projection: bool = False
    sample_size: int = 64


@dataclass(frozen=True)
class VAEConfig:
    """KL autoencoder (diffusers' `AutoencoderKL`), factor 2^(levels - 1)."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """CLIP text tower (transformers' `CLIPTextModel`)."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    positions: int = 77
    activation: str = "quick_gelu"
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower with projection (transformers' `CLIPVisionModelWithProjection`).

    The defaults are ViT-L/14.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    projection_dim: int = 768
    activation: str = "quick_gelu"


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP's two towers (transformers' `CLIPModel`); their space has `vision.projection_dim`."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True)
class DINOConfig:
    """DINO's vision transformer (transformers' `ViTModel`).

    The defaults are ViT-S/16.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_width: int = 1536
    activation: str = "gelu"
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ModelConfig:
    """One latent diffusion model: UNet, VAE and text tower."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)

    @property
    def multiple(self) -> int:
        """Both sides of a picture must be multiples of this many pixels (64 for SD)."""
        return self.vae.factor * 2 ** (len(self.unet.channels) - 1)

    def widened(self) -> "ModelConfig":
        """The InstructPix2Pix shape of this model: the image latent beside the noisy latent."""
        return replace(self, unet=replace(self.unet, in_channels=2 * self.vae.latent_channels))


SD15 = ModelConfig()
SD21 = ModelConfig(
    unet=UNetConfig(
        heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, sample_size=96
    ),
    vae=VAEConfig(sample_size=768),
    text=TextConfig(width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu"),
)
TINY = ModelConfig(
    unet=UNetConfig(
        channels=(32, 64, 96),
        attention=(True, True, False),
        heads=(4, 4, 4),
        layers_per_block=1,
        context_dim=64,
        norm_groups=16,
        sample_size=16,
    ),
    vae=VAEConfig(channels=(32, 64, 64), layers_per_block=1, norm_groups=16, sample_size=64),
    text=TextConfig(vocab_size=1024, width=64, layers=2, heads=4, mlp_width=256),
)
CLIP_L14 = CLIPConfig()
CLIP_B32 = CLIPConfig(
    text=TextConfig(width=512, heads=8, mlp_width=2048),
    vision=VisionConfig(
        patch_size=32, width=768, layers=12, heads=12, mlp_width=3072, projection_dim=512
    ),
)
CLIP_B16 = replace(CLIP_B32, vision=replace(CLIP_B32.vision, patch_size=16))
