# SPDX-License-Identifier: Apache-2.0
"""The backbones that scores are made of, in torch, as their authors' code and files have them."""

import re
from pathlib import Path

import torch
from torch import nn

from tests.oracles import randomize

POOLED = "pool"
VGG16 = (64, 64, POOLED, 128, 128, POOLED, *(256,) * 3, POOLED, *(512,) * 3, POOLED, *(512,) * 3)


def alexnet() -> nn.Sequential:
    """torchvision's `alexnet().features`, with random weights."""

    def conv(i: int, o: int, size: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, size, stride, padding), nn.ReLU()]

    layers = [
        *(*conv(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2)),
        *(*conv(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2)),
        *(*conv(192, 384, 3, 1, 1), *conv(384, 256, 3, 1, 1), *conv(256, 256, 3, 1, 1)),
        nn.MaxPool2d(3, 2),
    ]
    return seeded(nn.Sequential(*layers))


def vgg16() -> nn.Sequential:
    """torchvision's `vgg16().features`, with random weights."""
    layers, width = [], 3
    for step in (*VGG16, POOLED):
        if isinstance(step, int):
            layers += [nn.Conv2d(width, step, 3, padding=1), nn.ReLU()]
            width = step
        else:
            layers += [nn.MaxPool2d(2)]
    return seeded(nn.Sequential(*layers))


def seeded(module: nn.Sequential) -> nn.Sequential:
    randomize(module, 9)
    return module


BACKBONES = {"alex": alexnet, "vgg": vgg16}
"""By LPIPS' names."""


def state_dict(features: nn.Sequential) -> dict[str, torch.Tensor]:
    """As torchvision's files have it, with something of a classifier."""
    classifier = {"classifier.1.weight": torch.ones(4, 8), "classifier.1.bias": torch.ones(4)}
    return {f"features.{name}": x for name, x in features.state_dict().items()} | classifier


def write(features: nn.Sequential, path: Path) -> Path:
    """Writes the file as torchvision's are."""
    torch.save(state_dict(features), path)
    return path


class Block(nn.Module):
    """A block of DINO's vision transformer."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        self.attn["proj"] = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width)})
        self.mlp["fc2"] = nn.Linear(mlp_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        fused = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (c // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class OriginalDino(nn.Module):
    """DINO's vision transformer as its own code has it, tensor names and all."""

    def __init__(
        self, image_size: int, patch: int, width: int, layers: int, heads: int, mlp_width: int
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


DINO_NAMES = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^layernorm\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layernorm_after", "norm2"),
]


def dino_from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of DINO's own code for the tensors of a `ViTModel` in memory."""
    named = {}
    for name, x in state.items():
        for pattern, new in DINO_NAMES:
            name = re.sub(pattern, new, name)
        named[name] = x
    for name in [name for name in named if ".attention.q_proj." in name]:
        parts = [named.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        named[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return named
