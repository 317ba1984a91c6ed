# SPDX-License-Identifier: Apache-2.0
"""Opens LPIPS: a backbone from torchvision's file, and the linear layers that ship with us."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.lpips import ALEX, LPIPS, VGG, LPIPSConfig
from ip2p_jax.types import Params
from ip2p_jax.weights import tensor_file
from ip2p_jax.weights.hub import ASSETS
from ip2p_jax.weights.load import read_tensors
from ip2p_jax.weights.names import Table, rename
from ip2p_jax.weights.port import from_torch

HEADS = ASSETS / "lpips" / "heads.safetensors"
"""The linear layers of version 0.1, as released, under `alex.` and `vgg.`."""

FIRST = {(64, 3, 11, 11): ALEX, (64, 3, 3, 3): VGG}
"""By the shape of `features.0.weight`; the other names and shapes must then be right."""

TITLES = {"alex": "AlexNet", "vgg": "VGG16"}
EXPECTED = "torchvision's AlexNet (alexnet-owt-*.pth) or VGG16 (vgg16-*.pth)"


@dataclass(frozen=True)
class PretrainedLpips:
    """LPIPS in memory: its backbone, and the float32 parameters of `models.lpips.LPIPS`."""

    config: LPIPSConfig
    params: Params


def load_lpips(backbone_file: str) -> PretrainedLpips:
    """Opens torchvision's state dict of AlexNet or VGG16 (`.pth`, either layout of torch, or
    `.safetensors`) and adds LPIPS' linear layers; which of the two it is, shapes tell.

    Raises:
      FileNotFoundError, ValueError: one line that names the file or tensor and what was expected.
    """
    path = Path(backbone_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected {EXPECTED}")
    tensors = read_tensors(path)[0]
    config = recognise(tensors, str(path))
    heads = tensor_file.read(HEADS)[0]
    kept = {n: x for n, x in tensors.items() if not n.startswith("classifier.")}
    kept |= {n: x for n, x in heads.items() if n.startswith(f"{config.name}.")}
    table = names(config)
    _, params = abstract(LPIPS, config)
    source = f"{path}: read as torchvision's {TITLES[config.name]}"
    return PretrainedLpips(
        config, from_torch(params, kept, source, lambda name: rename(name, table))
    )


def recognise(tensors: Mapping[str, np.ndarray], source: str) -> LPIPSConfig:
    """Tells the backbones apart by their first convolution."""
    first = tensors.get("features.0.weight")
    if first is None:
        raise ValueError(f"{source}: no tensor features.0.weight, expected {EXPECTED}")
    if first.shape not in FIRST:
        raise ValueError(f"{source}: features.0.weight {first.shape}, expected {EXPECTED}")
    return FIRST[first.shape]


def names(cfg: LPIPSConfig) -> Table:
    """torchvision numbers convolutions, ReLUs and poolings through."""
    table, at = [], 0
    for i, stage in enumerate(cfg.stages):
        at += stage.pool > 0
        for j in range(stage.convs):
            table += [(f"stages.{i}.convs.{j}.", f"features.{at}.")]
            at += 2
        table += [(f"heads.{i}.", f"{cfg.name}.lin{i}.model.1.")]
    return table
