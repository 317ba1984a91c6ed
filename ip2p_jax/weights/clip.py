# SPDX-License-Identifier: Apache-2.0
"""Opens a CLIP: transformers' folder or hub id, a file in the names of OpenAI's code, or a run.

OpenAI's files state no dimensions: they are read off the tensors' shapes, and what shapes do not
show is OpenAI's (heads of width 64, quick GELU, the end token is the highest id). Files of others
in these names, such as open_clip's with the exact GELU, look the same: open those as transformers'
folders.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
from etils import epath
from transformers import CLIPTokenizer

from ip2p_jax.models.clip import CLIP
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import CLIPConfig, TextConfig, VisionConfig
from ip2p_jax.types import Params
from ip2p_jax.weights import ckpt, configs, hub
from ip2p_jax.weights.ldm import HEAD_WIDTH, count_up, unfuse
from ip2p_jax.weights.load import (
    ldm_tokenizer,
    open_tokenizer,
    read_json,
    read_tensors,
    read_weights,
    restore_ema,
)
from ip2p_jax.weights.names import CLIP_VISION, openai_clip_table, rename
from ip2p_jax.weights.port import from_torch, to_torch

NOT_WEIGHTS = re.compile(
    r"(.*\.)?position_ids|input_resolution|context_length|vocab_size|(.*\.)?attn_mask"
)
TRANSPOSED = ("text_projection", "visual.proj")  # OpenAI's (in, out)


@dataclass(frozen=True)
class PretrainedClip:
    """A CLIP in memory: dimensions, float32 parameters of `models.clip.CLIP`, tokenizer."""

    config: CLIPConfig
    params: Params
    tokenizer: CLIPTokenizer


def load_clip(model: str, revision: str | None = None) -> PretrainedClip:
    """Opens `model`: a folder of transformers' `CLIPModel`, a hub id of one, a run directory of
    ours that trained one, or a file in OpenAI's names: `.safetensors`, a pickled state dict, or one
    of the TorchScript archives that OpenAI released (`ViT-L-14.pt`), whose code is not run.

    revision: branch, tag or commit of a hub id.

    Raises:
      FileNotFoundError, ValueError: one line that names the file or tensor and what was expected.
    """
    path = hub.locate_clip(model, revision)
    if path.is_file():
        return load_openai(path)
    if (path / "base").is_dir():
        return load_clip_run(path)
    return load_folder(path)


def load_folder(path: Path) -> PretrainedClip:
    """Opens a folder of transformers."""
    config, tokenizer = read_clip_config(path)
    tensors, source = read_folder(path)
    _, params = abstract(CLIP, config)
    params = from_torch(params, weights(tensors), source, lambda name: rename(name, CLIP_VISION))
    return PretrainedClip(config, params, tokenizer)


def load_clip_run(run: Path) -> PretrainedClip:
    """Opens a run directory of ours: the EMA of its newest step, and what base/ says of it."""
    ema = restore_ema(epath.Path(run))
    if "clip" not in ema:
        raise ValueError(f"{run}: not a run that trained a CLIP, but {', '.join(ema)}")
    config, tokenizer = read_clip_config(run / "base")
    params = from_torch(abstract(CLIP, config)[1], to_torch(ema["clip"]), f"{run}: EMA of the clip")
    return PretrainedClip(config, params, tokenizer)


def read_clip_config(path: Path) -> tuple[CLIPConfig, CLIPTokenizer]:
    """Dimensions and tokenizer of a folder; without a tokenizer in it, CLIP's own is taken."""
    file = path / "config.json"
    config = configs.clip_from_json(read_json(file), str(file))
    has_tokenizer = any((path / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    own = open_tokenizer(path) if has_tokenizer else ldm_tokenizer(config.text, None, str(path))
    check_tokenizer(own, config.text, str(path))
    return config, own


def read_folder(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads a folder's tensors, pickled ones only where there are no others; names the source."""
    pickled = path / hub.CLIP_PICKLED
    if pickled.is_file() and not any(path.glob("model*.safetensors*")):
        return ckpt.read(pickled), str(pickled)
    return read_weights(path, "model")


def load_openai(path: Path) -> PretrainedClip:
    """Opens a file in OpenAI's names."""
    tensors = weights(read_tensors(path)[0])
    config = openai_config(tensors, str(path))
    tensors = unfuse(tensors) | {name: tensors[name].T for name in TRANSPOSED}
    _, params = abstract(CLIP, config)
    table = openai_clip_table(config)
    params = from_torch(params, tensors, str(path), lambda name: rename(name, table))
    return PretrainedClip(config, params, ldm_tokenizer(config.text, None, str(path)))


def weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops by name what is not a weight of the towers."""
    return {name: x for name, x in tensors.items() if not NOT_WEIGHTS.fullmatch(name)}


def openai_config(tensors: Mapping[str, np.ndarray], source: str) -> CLIPConfig:
    """Reads the dimensions off the shapes of a file in OpenAI's names.

    Raises:
      ValueError: names `source` and a tensor that is missing or of another number of dimensions.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(
                f"{source}: no tensor {name}, so not a CLIP ViT in OpenAI's names (of a model in "
                "transformers' names give the folder)"
            )
        if tensors[name].ndim != rank:
            raise ValueError(f"{source}: {name} {tensors[name].shape}, expected {rank} dimensions")
        return tensors[name].shape

    def heads(name: str, width: int) -> int:
        if width % HEAD_WIDTH:
            raise ValueError(f"{source}: {name} is {width} wide, expected a multiple of 64")
        return width // HEAD_WIDTH

    block = "transformer.resblocks.{}."
    shapes = {name: x.shape for name, x in tensors.items()}
    vocab, width = shape("token_embedding.weight", 2)
    text = TextConfig(
        vocab_size=vocab,
        width=width,
        layers=count_up(shapes, block + "ln_1.weight"),
        heads=heads("token_embedding.weight", width),
        mlp_width=shape(block.format(0) + "mlp.c_fc.weight", 2)[0],
        positions=shape("positional_embedding", 2)[0],
    )
    width, _, patch, _ = shape("visual.conv1.weight", 4)
    projection = shape("visual.proj", 2)[1]
    if shape("text_projection", 2) != (text.width, projection):
        raise ValueError(
            f"{source}: text_projection {shapes['text_projection']}, expected "
            f"{(text.width, projection)}"
        )
    vision = VisionConfig(
        image_size=patch * isqrt(max(0, shape("visual.positional_embedding", 2)[0] - 1)),
        patch_size=patch,
        width=width,
        layers=count_up(shapes, "visual." + block + "ln_1.weight"),
        heads=heads("visual.conv1.weight", width),
        mlp_width=shape("visual." + block.format(0) + "mlp.c_fc.weight", 2)[0],
        projection_dim=projection,
    )
    return CLIPConfig(text, vision)


def check_tokenizer(tokenizer: CLIPTokenizer, cfg: TextConfig, source: str) -> None:
    """Refuses a tokenizer whose ids the text tower does not have or whose end it does not see."""
    if len(tokenizer) > cfg.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} entries, config.json says vocab_size "
            f"{cfg.vocab_size}"
        )
    if cfg.eos_token_id not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"{source}: config.json says eos_token_id {cfg.eos_token_id}, the tokenizer ends texts "
            f"with {tokenizer.eos_token_id}"
        )
