# SPDX-License-Identifier: Apache-2.0
"""Low-rank additions to the matrices of a network (LoRA, Hu et al. 2022): files, and merging.

Where a layer has one, its matrix W becomes W + scale * B A. *Pairs* are nested dicts like those of
the network's parameters, of these layers only, and hold `lora_A` and `lora_B` in the place of the
layer: weights (rank, in) and (out, rank), of convolutions kernels (h, w, in, rank) and
(1, 1, rank, out), so that `port` names them as PEFT does.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ip2p_jax.types import Params
from ip2p_jax.weights import tensor_file
from ip2p_jax.weights.port import fault, from_torch, leaves

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls an adapter's file in its folder."""

METADATA = "lora_adapter_metadata"
"""Key of a file's metadata under which diffusers keeps PEFT's configuration, as JSON."""

PEFT_CONFIG = "adapter_config.json"
"""Where PEFT's own models keep it: beside the file."""

PREFIXES = {
    "unet": ("unet.", "", "base_model.model.", "lora_unet_"),
    "text": ("text_encoder.", "text_encoder.text_model.", "lora_te_", "lora_te_text_model_"),
}
"""What stands before a layer's name; after the last kind, kohya's, its dots are underscores."""

ENDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora.down.weight": "lora_A",  # as diffusers' training scripts write it
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    ".lora_down.weight": "lora_A",  # as kohya's scripts write it
    ".lora_up.weight": "lora_B",
    ".alpha": "alpha",
}
REFUSED = ("use_dora", "use_rslora", "lora_bias")
"""Settings of PEFT under which B and A mean something else."""

Found = dict[str, dict[str, dict[str, np.ndarray]]]
"""Tensors of a file: part -> layer -> "lora_A", "lora_B" or "alpha"."""


class Adapter(NamedTuple):
    """The pairs of a UNet as a file holds them: in PEFT's names, not scaled; all of one rank."""

    tensors: dict[str, np.ndarray]
    alpha: float  # scale = alpha / rank

    @property
    def rank(self) -> int:
        (rank,) = {x.shape[0] for name, x in self.tensors.items() if ".lora_A." in name}
        return rank

    def on(self, params: Params, source: str) -> Params:
        """The UNet `params` with the pairs merged; ValueError names `source` and what misfits."""
        pairs = port_pairs(matrices(params), self.tensors, source)
        return merge(params, pairs, self.alpha / self.rank)


def matrices(params: Params) -> dict[str, Any]:
    """What can have an addition, by layer: weights of linear maps, kernels of convolutions."""
    found = {path: x for path, x in leaves(params) if path[-1] in ("weight", "kernel")}
    return {".".join(map(str, path[:-1])): x for path, x in found.items()}


def shapes(of: Mapping[str, Any], rank: Mapping[str, int]) -> Params:
    """The shapes of the pairs of these layers, whose matrices are `of`."""
    tree: Params = {}
    for layer, x in of.items():
        node, r = tree, rank[layer]
        for key in layer.split("."):
            node = node.setdefault(int(key) if key.isdecimal() else key, {})
        if len(x.shape) == 2:
            name, a, b = "weight", (r, x.shape[1]), (x.shape[0], r)
        else:
            name, a, b = "kernel", (*x.shape[:3], r), (1, 1, r, x.shape[3])
        node["lora_A"] = {name: jax.ShapeDtypeStruct(a, jnp.float32)}
        node["lora_B"] = {name: jax.ShapeDtypeStruct(b, jnp.float32)}
    return tree


def merge(params: Params, pairs: Params, scale: float = 1.0) -> Params:
    """`params` with scale * B A added to the matrix of every layer of `pairs` (section 4.1)."""
    return params | {
        key: add_product(params[key], x, scale) if "lora_A" in x else merge(params[key], x, scale)
        for key, x in pairs.items()
    }


def add_product(layer: Params, pair: Params, scale: float) -> Params:
    """One layer with its addition; a window's convolution makes `rank` channels, mixed by B."""
    [(name, a)], [b] = pair["lora_A"].items(), pair["lora_B"].values()
    product = b @ a if name == "weight" else a @ b[0, 0]
    return layer | {name: layer[name] + scale * product}


def add(params: dict[str, Params], option: str) -> dict[str, Params]:
    """The parts of a model with the file that `option` names merged: "FILE" or "FILE:SCALE".

    Raises as `read`.
    """
    path, _, tail = option.rpartition(":")
    try:
        file, scale = (path, float(tail)) if path else (option, 1.0)
    except ValueError:
        file, scale = option, 1.0
    if not np.isfinite(scale):
        raise ValueError(f"{option}: expected a LoRA as FILE or FILE:SCALE, SCALE a finite number")
    read_in = read(Path(file).expanduser(), params)
    return params | {part: merge(params[part], pairs, scale) for part, pairs in read_in.items()}


def read(path: Path, params: Mapping[str, Params]) -> dict[str, Params]:
    """The pairs of a file by part, alpha / rank multiplied into B, for a model of these `params`.

    `path` is a `.safetensors` file or a folder with diffusers' `FILE`. Names are those of
    diffusers, PEFT or kohya's scripts. A file that does not tell alpha means alpha = rank.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, and the tensors or the setting
        that do not fit the model.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a LoRA as .safetensors")
    tensors, metadata = tensor_file.read(file)
    settings = read_settings(file, metadata)
    of = {part: matrices(params[part]) for part in PREFIXES}
    return {
        part: port_pairs(of[part], scaled(layers, settings[part], file), str(file))
        for part, layers in sort(tensors, of, str(file)).items()
    }


def port_pairs(of: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> Params:
    """Pairs from tensors in PEFT's names, for matrices `of`; raises ValueError as `from_torch`."""
    layers = dict.fromkeys(name.partition(".lora_")[0] for name in tensors)
    ranks = {layer: rank_in(layer, tensors) for layer in layers}
    if unknown := [f"{layer}.lora_A.weight" for layer in ranks if layer not in of]:
        raise ValueError(f"{source}: {fault('unexpected', unknown)}")
    return from_torch(shapes({layer: of[layer] for layer in ranks}, ranks), tensors, source)


def rank_in(layer: str, tensors: Mapping[str, np.ndarray]) -> int:
    """The rank of a layer's pair: A has so many rows."""
    a, b = (tensors.get(f"{layer}.lora_{x}.weight", np.empty(())).shape for x in "AB")
    return a[0] if a else b[1] if len(b) > 1 else 1


def sort(tensors: Mapping[str, np.ndarray], of: Mapping[str, Any], source: str) -> Found:
    """Finds the place of each tensor; raises ValueError that names those that have none."""
    places = {
        prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer): (part, layer)
        for part, prefixes in PREFIXES.items()
        for prefix in prefixes
        for layer in of[part]
    }
    found: Found = {}
    unknown = []
    for name, x in tensors.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        part, layer = places.get(name.removesuffix(end or ""), ("", ""))
        if end is None or not part:
            unknown.append(f"{name} {x.shape}")
        else:
            found.setdefault(part, {}).setdefault(layer, {})[ENDS[end]] = x
    if unknown or not found:
        what = fault("that no layer of the model has", unknown) if unknown else "no tensors"
        raise ValueError(f"{source}: not a LoRA of this model: {what}")
    return found


def scaled(
    layers: dict[str, dict[str, np.ndarray]], settings: dict, file: Path
) -> dict[str, np.ndarray]:
    """The tensors in PEFT's names, B times alpha / rank."""
    tensors = {}
    for layer, found in layers.items():
        alpha = found.pop("alpha", None)
        for leaf, x in found.items():
            tensors[f"{layer}.{leaf}.weight"] = x
        b = found.get("lora_B")
        if b is None or b.ndim < 2 or b.dtype not in tensor_file.FLOATS:
            continue  # `from_torch` refuses it by name
        rank = b.shape[1]
        value = np.asarray(own_alpha(layer, settings, rank, file) if alpha is None else alpha)
        if value.size != 1 or not np.isfinite(value).all():
            raise ValueError(f"{file}: alpha of {layer} is {value}, expected one finite number")
        value = float(value.item())
        if value != rank:
            tensors[f"{layer}.lora_B.weight"] = b.astype(np.float32) * np.float32(value / rank)
    return tensors


def own_alpha(layer: str, settings: dict, rank: int, file: Path) -> float:
    """What PEFT's configuration says of a layer: its own pattern first, as PEFT matches it."""
    patterns = settings.get("alpha_pattern") or {}
    try:
        value = settings.get("lora_alpha", rank)
        for pattern, other in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                value = other
                break
        return float(value)
    except (TypeError, AttributeError, ValueError, re.error) as error:
        raise ValueError(f"{file}: the adapter's alpha is not sound ({error})") from None


def read_settings(file: Path, metadata: Mapping[str, str]) -> dict[str, dict]:
    """PEFT's configuration by part: in the file, beside it, or none."""
    beside, source = file.with_name(PEFT_CONFIG), f"{file}: metadata {METADATA}"
    text = metadata.get(METADATA, "{}")
    if METADATA not in metadata and beside.is_file():
        text, source = beside.read_text("utf-8"), str(beside)
    try:
        said = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error})") from error
    if not isinstance(said, dict):
        raise ValueError(f"{source}: expected a JSON object")
    settings = {"unet": under("unet.", said), "text": under("text_encoder.", said)}
    if not any(settings.values()):
        settings["unet"] = said
    for of_part in settings.values():
        if wrong := [key for key in REFUSED if of_part.get(key)]:
            raise ValueError(f"{source}: {wrong[0]} is set: such adapters are not read here")
    return settings


def under(prefix: str, said: dict) -> dict:
    """The entries whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): x for key, x in said.items() if key.startswith(prefix)}


def write(adapter: Adapter, path: Path, *, dtype: DTypeLike = jnp.float32) -> None:
    """Writes what `pipe.load_lora_weights(path)` of diffusers reads: the pairs of a UNet.

    Raises:
      ValueError: `path` is not called .safetensors, exists, or a value does not fit into `dtype`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if path.exists():
        raise ValueError(f"{path} is already there")
    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted({name.partition(".lora_")[0] for name in adapter.tensors}),
    }
    tensors = {f"unet.{name}": x for name, x in adapter.tensors.items()}
    text = json.dumps({f"unet.{key}": x for key, x in settings.items()}, indent=2, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor_file.write(path, tensors, jnp.dtype(dtype), {METADATA: text}, lambda count: None)
