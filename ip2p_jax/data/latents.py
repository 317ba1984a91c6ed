# SPDX-License-Identifier: Apache-2.0
"""What a VAE makes of training pairs, on disk: so that training need not run its encoder.

A latent folder holds ArrayRecord shards, `manifest.json` (what every shard must contain, and how
the latents were made) and `report.json` (what was left out, and why). A record is one view of a
pair: the moments of the posterior, from which a sample is drawn anew at each access, and the texts.
Views of one prompt are neighbours.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float16
from tensorflow_datasets.core import example_serializer

from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket
from ip2p_jax.data.manifest import MANIFEST, pictures_of, prompts_of
from ip2p_jax.data.manifest import verify as verify_shards
from ip2p_jax.data.transforms import captions_of

SHARDS = "shards"
"""Where the shards lie inside a latent folder."""


class Latents(NamedTuple):
    """One view of a pair, not scaled: means of both posteriors, log-variance of the output's.

    float16 has 11 bits: at most 2^-11 of a value is lost, an eighth of what bfloat16 loses when the
    network computes with it.
    """

    input: Float16[np.ndarray, "h w z"]
    output: Float16[np.ndarray, "h w z"]
    log_var: Float16[np.ndarray, "h w z"]
    instruction: str
    input_caption: str
    output_caption: str
    prompt: str
    seed: str


class MadeWith(NamedTuple):
    """What decides which latents a data set gives; sizes in px, as in config.Data."""

    vae: str  # digest of the encoder's weights
    resolution: int
    resize_min: int
    resize_max: int
    flip: float
    views: int  # of each pair
    buckets: str = ""


MOMENTS = ("input", "output", "log_var")
_TENSOR = tfds.features.Tensor(
    shape=(None, None, None), dtype=np.float16, encoding=tfds.features.Encoding.BYTES
)
FEATURES = tfds.features.FeaturesDict(
    {name: _TENSOR if name in MOMENTS else tfds.features.Text() for name in Latents._fields}
)
_SPECS: Any = FEATURES.get_serialized_info()
_SERIALIZER = example_serializer.ExampleSerializer(_SPECS)


def serialize(latents: Latents) -> bytes:
    """The record of one view."""
    example = FEATURES.encode_example(latents._asdict())
    return _SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True)


def deserialize(record: bytes) -> Latents:
    """The inverse of `serialize`."""
    example: Any = FEATURES.deserialize_example_np(record)
    return Latents(**{k: v if k in MOMENTS else v.decode() for k, v in example.items()})


def made_with(folder: str | os.PathLike) -> MadeWith | None:
    """How the latents in a folder were made; None if it holds none, but pictures or nothing."""
    path = Path(folder) / MANIFEST
    made = json.loads(path.read_text()).get("latents") if path.is_file() else None
    return None if made is None else MadeWith(**made)


def check_settings(made: dict[str, MadeWith | None], cfg: Data) -> None:
    """Raises ValueError, naming the first setting in which the latents in one of these folders are
    not what pictures as `cfg` sees them give, or a folder without latents."""
    wanted = {
        "resolution": cfg.resolution,
        "resize_min": cfg.resize_min or cfg.resolution,
        "resize_max": cfg.resize_max or cfg.resolution,
        "flip": cfg.flip,
        "buckets": cfg.buckets,
    }
    for folder, how in made.items():
        if how is None:
            raise ValueError(f"config.data.mix: {folder} holds no latents, other folders do")
        for name, value in wanted.items():
            if (was := getattr(how, name)) != value:
                raise ValueError(
                    f"config.data.{name} is {value}, the latents in {folder} were made with {was}"
                )


def check_encoder(made: dict[str, MadeWith | None], vae: str) -> None:
    """Raises ValueError naming the first folder that another encoder than that of digest `vae` has
    made."""
    for folder, how in made.items():
        if how is not None and how.vae != vae:
            raise ValueError(
                f"config.data.path: the latents in {folder} were made by the encoder {how.vae}, "
                f"that of this run's VAE is {vae}"
            )


def cached(
    latents: Latents, rng: np.random.Generator, cfg: Data, bucket: Bucket
) -> tuple[Any, Any, Any, str]:
    """What training to edit sees of a record. All draws but that of the record were made before."""
    return *latents[:3], latents.instruction


def cached_output(
    latents: Latents, rng: np.random.Generator, cfg: Data, bucket: Bucket
) -> tuple[Any, Any, str]:
    """What text-to-image training sees of a record: the output, whose posterior is there whole.

    Raises ValueError naming a pair that lacks a caption.
    """
    return latents.output, latents.log_var, captions_of(latents)[1]


class LatentSource:
    """Random access to the views of one split; `prompts[i]` are the records of prompt i, of views
    of `pictures[i]` (width, height) px, if the folder says so."""

    def __init__(self, folder: str | os.PathLike, split: str, *, check_hashes: bool = False):
        """Verifies the folder against its manifest; ValueError or FileNotFoundError name faults."""
        self._folder = folder = Path(folder)
        manifest = verify_shards(folder, hashes=check_hashes)
        if not made_with(folder):
            raise ValueError(f"{folder}: holds no latents (python -m ip2p_jax.cache_latents)")
        self.prompts = prompts_of(folder, manifest, split)
        self.pictures = pictures_of(manifest, split)
        files = [str(folder / shard.file) for shard in manifest[split]]
        self._records: Any = grain.sources.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Latents:
        if not 0 <= record < len(self):
            raise IndexError(record)
        try:
            return deserialize(self._records[record])
        except RuntimeError as error:
            raise ValueError(f"{self._folder}: record {record} is damaged ({error})") from None


def verify(folder: str | os.PathLike) -> tuple[dict[str, int], list[str]]:
    """Reads all of a latent folder: the views of each split, and a line for each that is not right.

    Raises ValueError or FileNotFoundError naming the first shard that is missing, truncated,
    doubled, unknown, or of another content than the manifest says; or a folder of pictures.
    """
    counts, faults = {}, []
    shapes: dict[Any, tuple[int, ...]] = {}
    for split in verify_shards(Path(folder), hashes=True):
        source = LatentSource(folder, split)
        counts[split] = len(source)
        sizes = [tuple(x) for x in source.pictures] or [()] * len(source.prompts)
        for i, size in ((i, x) for p, x in zip(source.prompts, sizes, strict=True) for i in p):
            moments = source[i][:3]
            shape = shapes.setdefault(size, moments[0].shape)
            if any(x.shape != shape for x in moments):
                faults.append(f"{split} {i}: its moments are not all of shape {shape}")
            elif not all(np.isfinite(x).all() for x in moments):
                faults.append(f"{split} {i}: its moments are not finite")
    return counts, faults
