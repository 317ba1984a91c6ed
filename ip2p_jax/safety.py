# SPDX-License-Identifier: Apache-2.0
"""The safety checker that Stable Diffusion's folders bring: which pictures are not to be shown.

CLIP embeds a picture; its cosine similarities to 17 concepts, and to 3 that call for special care,
are compared with one threshold each. The embeddings and thresholds come with the model; the
arithmetic, its rounding included, is that of diffusers' `StableDiffusionSafetyChecker`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32
from PIL import Image

from ip2p_jax.models.clip import MEAN, STD, CLIPVision, unit
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import VisionConfig
from ip2p_jax.types import Params
from ip2p_jax.weights import configs
from ip2p_jax.weights.load import Pretrained, read_json, read_tensors
from ip2p_jax.weights.names import CLIP_VISION, POSITION_IDS, rename
from ip2p_jax.weights.port import from_torch

CONCEPTS, SPECIAL = 17, 3
ADJUSTMENT = 0.01
"""How much stricter the thresholds are once a special concept has been met."""

WEIGHTS = ("model.safetensors", "model.*.safetensors", "pytorch_model.bin", "pytorch_model.*.bin")
PREPROCESSING_FIXED = dict.fromkeys(
    ("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True
)
PREPROCESSING_READ = {
    "crop_size": 224,
    "image_mean": MEAN,
    "image_std": STD,
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
    "size": 224,
}


class Scores(NamedTuple):
    """Similarity minus threshold, to three decimals; a picture is flagged by any concept over 0."""

    special: Float[Any, "b 3"]
    concept: Float[Any, "b 17"]


class Scorer(nnx.Module):
    """CLIP's vision tower and the concepts, with the checkpoint's tensor names."""

    def __init__(self, cfg: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vision_model = CLIPVision(cfg, dtype=dtype, rngs=rngs)
        self.special_care_embeds = nnx.Param(jnp.zeros((SPECIAL, cfg.projection_dim)))
        self.special_care_embeds_weights = nnx.Param(jnp.zeros(SPECIAL))
        self.concept_embeds = nnx.Param(jnp.zeros((CONCEPTS, cfg.projection_dim)))
        self.concept_embeds_weights = nnx.Param(jnp.zeros(CONCEPTS))

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Scores:
        """Scores of preprocessed pictures (b, image_size, image_size, 3)."""
        x = unit(self.vision_model(pixels))
        special = x @ unit(self.special_care_embeds[...]).T
        special = special - self.special_care_embeds_weights[...][None]
        concept = x @ unit(self.concept_embeds[...]).T - self.concept_embeds_weights[...][None]
        adjustment, rounded = jnp.zeros(len(x)), []
        for score in special.T:  # one that is met makes those after it stricter too
            rounded.append(jnp.round(score + adjustment, 3))
            adjustment = jnp.where(rounded[-1] > 0, ADJUSTMENT, adjustment)
        return Scores(jnp.stack(rounded, axis=1), jnp.round(concept + adjustment[:, None], 3))


@dataclass(frozen=True)
class Preprocessing:
    """transformers' `CLIPImageProcessor`: shortest edge, centre crop, scale, mean and deviation."""

    edge: int
    crop: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "crop crop 3"]:
        """The pixels that CLIP takes."""
        short = min(image.size)
        width, height = (int(self.edge * side / short) for side in image.size)
        image = image.convert("RGB").resize((width, height), Image.Resampling(self.resample))
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        pixels = np.asarray(image.crop((left, top, left + self.crop, top + self.crop)), np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels * np.float32(self.scale) - mean[None, None]) / std[None, None]


class SafetyChecker:
    """Says which pictures a model's safety checker flags; one at a time, so compiled once."""

    def __init__(self, config: VisionConfig, params: Params, preprocessing: Preprocessing):
        graphdef, _ = abstract(Scorer, config)

        @jax.jit
        def score(params: Params, pixels: Float[Array, "b h w 3"]) -> Scores:
            with jax.default_matmul_precision("highest"):  # scores are read to three decimals
                return nnx.merge(graphdef, params)(pixels)

        self.score = score
        self.params = jax.device_put(params)
        self.preprocessing = preprocessing

    @classmethod
    def from_pretrained(cls, pretrained: Pretrained) -> "SafetyChecker":
        """Opens the safety checker that came with a model.

        Raises:
          ValueError: names --safety and what the model lacks, or a file and what is wrong in it.
        """
        folder = pretrained.safety
        if folder is None:
            raise ValueError("--safety: the model has no safety_checker folder with weights in it")
        for file in (folder / "config.json", extractor(folder)):
            if not file.is_file():
                raise ValueError(f"--safety: {file} is not there")
        config = configs.vision_from_json(
            read_json(folder / "config.json"), f"{folder}/config.json"
        )
        params = read_params(folder, config)
        return cls(config, params, read_preprocessing(extractor(folder), config.image_size))

    def scores(self, image: Image.Image) -> Scores:
        """The scores of one picture, (1, 3) and (1, 17)."""
        return Scores(*map(np.asarray, self.score(self.params, self.preprocessing(image)[None])))

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture is flagged."""
        return [bool((self.scores(image).concept > 0).any()) for image in images]

    def black_out(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures, those that are flagged replaced by black ones of their size."""
        return [
            Image.new("RGB", image.size) if flagged else image
            for image, flagged in zip(images, self.flagged(images), strict=True)
        ]


def extractor(folder: Path) -> Path:
    """The file that says how pictures are prepared, in the folder beside the checker's."""
    return folder.parent / "feature_extractor" / "preprocessor_config.json"


def read_params(folder: Path, config: VisionConfig) -> Params:
    """Reads the weights; released files say `vision_model.` twice, today's once."""
    files = [file for pattern in WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        raise ValueError(f"--safety: {folder} holds no weights ({', '.join(WEIGHTS)})")
    file = files[0]
    tensors, _ = read_tensors(file)
    tensors = {name: x for name, x in tensors.items() if not name.endswith(POSITION_IDS)}
    doubled = any(name.startswith("vision_model.vision_model.") for name in tensors)
    spelling = [*CLIP_VISION, ("vision_model.", "vision_model." * (1 + doubled))]
    _, params = abstract(Scorer, config)
    return from_torch(params, tensors, str(file), lambda name: rename(name, spelling))


def read_preprocessing(file: Path, image_size: int) -> Preprocessing:
    """Reads a preprocessor's settings; sizes are numbers or, since 2022, objects.

    Raises:
      ValueError: names the file and the setting that is not supported.
    """
    got = configs.read(read_json(file), str(file), PREPROCESSING_READ, PREPROCESSING_FIXED)
    edge, crop = side(got["size"], ("shortest_edge",)), side(got["crop_size"], ("height", "width"))
    if crop != image_size or edge < crop:
        raise ValueError(
            f"{file}: size {got['size']}, crop_size {got['crop_size']}; expected a shortest edge "
            f"and a centre crop to the {image_size} px that the safety checker takes"
        )
    mean, std = tuple(got["image_mean"]), tuple(got["image_std"])
    return Preprocessing(edge, crop, got["resample"], got["rescale_factor"], mean, std)


def side(size: Any, keys: tuple[str, ...]) -> int:
    """A length from a number, or from an object of these keys with one value; 0 from any other."""
    sizes: dict[str, Any] = size if isinstance(size, dict) else {key: size for key in keys}
    values = set(sizes.values())
    return values.pop() if set(sizes) == set(keys) and len(values) == 1 else 0
