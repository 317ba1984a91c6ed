# SPDX-License-Identifier: Apache-2.0
"""CLIP on torch with the names and layout of OpenAI's code: the oracle's side.

Radford et al. 2021; q, k and v are one projection, what goes into the shared space is (in, out).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mask: Tensor | None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU()}
        self.mlp = nn.Sequential(
            OrderedDict(**layers, c_proj=nn.Linear(4 * width, width))  # in this order
        )
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, mask: Tensor | None = None):
        super().__init__()
        blocks = [Block(width, width // 64, mask) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, space: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.proj = nn.Parameter(torch.zeros(width, space))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding + torch.zeros_like(patches[:, :1])
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAIClip(nn.Module):
    """Image and text embeddings; `vision` is (size, patch, width, layers)."""

    def __init__(
        self,
        vision: tuple[int, int, int, int],
        vocabulary: int,
        width: int,
        layers: int,
        space: int,
    ):
        super().__init__()
        mask = torch.full((77, 77), -torch.inf).triu(1)
        self.visual = Visual(*vision, space)
        self.transformer = Transformer(width, layers, mask)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(77, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, space))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding)
        at = tokens.argmax(dim=-1)
        pooled = self.ln_final(x)[torch.arange(x.shape[0]), at]
        return self.visual(images), pooled @ self.text_projection


BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
}


def from_transformers(tensors: dict[str, Tensor], layers: dict[str, int]) -> dict[str, Tensor]:
    """The state dict of `OpenAIClip` from that of transformers' `CLIPModel`."""
    state = {new: tensors[old] for old, new in TOP.items()}
    state["text_projection"] = tensors["text_projection.weight"].T
    state["visual.proj"] = tensors["visual_projection.weight"].T
    for tower, prefix in (("text", ""), ("vision", "visual.")):
        for i in range(layers[tower]):
            old = f"{tower}_model.encoder.layers.{i}"
            new = f"{prefix}transformer.resblocks.{i}"
            for leaf in ("weight", "bias"):
                for a, b in BLOCK.items():
                    state[f"{new}.{b}.{leaf}"] = tensors[f"{old}.{a}.{leaf}"]
                qkv = [tensors[f"{old}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                state[f"{new}.attn.in_proj_{leaf}"] = torch.cat(qkv)
    return {name: x.clone().contiguous() for name, x in state.items()}
