# SPDX-License-Identifier: Apache-2.0
"""Training pairs on disk: a TFDS data set of ArrayRecord shards, without TensorFlow.

A data folder holds `pairs/1.0.0/` (the data set), `manifest.json` (what every shard must contain),
`report.json` (what was left out, and why) and `settings.json` (what was packed: only data_gen.pack
reads it). Pairs of one prompt are neighbours.
"""

import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.splits import SplitDict

from ip2p_jax.data.manifest import Manifest, Shard, pictures_of, prompts_of, verify

FOLDER = "pairs/1.0.0"
"""Where TFDS puts its files inside a data folder: name and version of the builder below."""

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""Which part of the sorted prompt list belongs to which split."""


def split_range(count: int, split: str) -> range:
    """Which of `count` sorted prompts belong to a split; ValueError names the splits there are."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}, only {', '.join(SPLITS)}")
    low, high = SPLITS[split]
    return range(math.floor(low * count), math.floor(high * count))


class Pair(NamedTuple):
    """One edit: encoded JPEG or PNG pictures of equal size, and texts ("" where unknown)."""

    input: bytes
    output: bytes
    instruction: str
    input_caption: str
    output_caption: str
    prompt: str
    seed: str


FEATURES = tfds.features.FeaturesDict(
    {
        "input": tfds.features.Image(shape=(None, None, 3)),
        "output": tfds.features.Image(shape=(None, None, 3)),
        "instruction": tfds.features.Text(),
        "input_caption": tfds.features.Text(),
        "output_caption": tfds.features.Text(),
        "prompt": tfds.features.Text(),
        "seed": tfds.features.Text(),
    }
)
_SPECS: Any = FEATURES.get_serialized_info()
_SERIALIZER = example_serializer.ExampleSerializer(_SPECS)
_ENCODED = {"input": tfds.decode.SkipDecoding(), "output": tfds.decode.SkipDecoding()}


def serialize(pair: Pair) -> bytes:
    """The record of one pair. Pictures go in as file objects: as they are, never decoded."""
    pictures = {"input": io.BytesIO(pair.input), "output": io.BytesIO(pair.output)}
    example = FEATURES.encode_example(pair._asdict() | pictures)
    return _SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True)


def deserialize(record: bytes) -> Pair:
    """The inverse of `serialize`."""
    example: Any = FEATURES.deserialize_example_np(record, decoders=_ENCODED)
    if missing := [name for name, value in example.items() if value is None]:
        raise ValueError(f"has no field {missing[0]}")
    texts = {k: v.decode() for k, v in example.items() if k not in _ENCODED}
    return Pair(input=example["input"], output=example["output"], **texts)


class Pairs(FileReaderBuilder):
    """The TFDS builder: takes shards that were written apart, in parallel, into one data set.

    TFDS's own writer would put every record through one process and TensorFlow's file system.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so there are no checksums beside the code

    def __init__(self, data_dir: Path, shards: dict[str, list[tuple[Path, Shard]]]):
        self._shards = shards
        self.manifest: Manifest = {}
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=FEATURES, disable_shuffling=True)

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        """Moves the shards to where TFDS expects them, and writes down the splits."""
        infos = [self._take(split, shards) for split, shards in self._shards.items()]
        self.info.set_splits(SplitDict(infos))

    def _take(self, split: str, shards: list[tuple[Path, Shard]]) -> tfds.core.SplitInfo:
        names = self._get_filename_template(split_name=split)
        self.manifest[split] = []
        for i, (path, shard) in enumerate(shards):
            file = names.sharded_filepath(shard_index=i, num_shards=len(shards))
            os.replace(path, file)
            self.manifest[split].append(shard._replace(file=f"{FOLDER}/{file.name}"))
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for _, shard in shards],
            num_bytes=sum(shard.bytes for _, shard in shards),
            filename_template=names,
        )


class PairSource:
    """Random access to the pairs of one split; `prompts[i]` are the records of prompt i, the first
    of which has pictures of `pictures[i]` (width, height) px, if the folder says so."""

    def __init__(self, folder: str | os.PathLike, split: str, *, check_hashes: bool = False):
        """Verifies the folder against its manifest; ValueError or FileNotFoundError name faults."""
        self._folder = folder = Path(folder)
        manifest = verify(folder, hashes=check_hashes)
        self.prompts = prompts_of(folder, manifest, split)
        self.pictures = pictures_of(manifest, split)
        if not (folder / FOLDER).is_dir():
            raise ValueError(f"{folder}: holds no pictures, expected a folder of data_gen.pack")
        builder: Any = tfds.builder_from_directory(folder / FOLDER)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Pair:
        if not 0 <= record < len(self):
            raise IndexError(record)
        try:
            return deserialize(self._records[record])
        except (RuntimeError, ValueError, DecodeError) as error:
            raise ValueError(f"{self._folder}: record {record} is damaged ({error})") from None
