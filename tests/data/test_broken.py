# SPDX-License-Identifier: Apache-2.0
"""Claims: a broken record in a pack is replaced and counted, the same on any host and after a
restart; what can be converted is; too many are an error."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from ip2p_jax.config import Data
from ip2p_jax.data import manifest
from ip2p_jax.data.loader import TRIES, TooManyBroken, make_loader
from ip2p_jax.data.pairs import deserialize, serialize
from ip2p_jax.data.tokens import tokenize
from tests.data.released import Words, encode, identify, picture
from tests.oracles import small_tokenizer


def loader(folder, *, host=0, hosts=1, start=0, **options):
    settings = {"batch_size": 12, "resolution": 16, "threads": 1, "broken": 0.5} | options
    cfg = Data(path=str(folder), **settings)
    return make_loader(cfg, Words(), seed=3, host_index=host, host_count=hosts, start=start)


def rewrite(packed: Path, folder: Path, change) -> Path:
    """A copy of a pack in which `change(number, pair)` gives each record of the first shard."""
    shutil.copytree(packed, folder)
    listed = manifest.load_manifest(folder)
    first = listed["train"][0]
    path = folder / first.file
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    os.unlink(path)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, record in enumerate(records):
        changed = change(i, deserialize(record))
        writer.write(changed if isinstance(changed, bytes) else serialize(changed))
    writer.close()
    listed["train"][0] = manifest.measure(path, first.sizes)._replace(file=first.file)
    manifest.save_manifest(folder, listed)
    return folder


def with_mode(data: bytes, mode: str, format: str = "JPEG", **options) -> bytes:
    """The picture in another mode."""
    with Image.open(io.BytesIO(data)) as image:
        encoded = io.BytesIO()
        image.convert(mode).save(encoded, format, **options)
    return encoded.getvalue()


def without_instruction(pair) -> bytes:
    """A record that lacks a field."""
    from ip2p_jax.data import pairs

    kept = {k: v for k, v in pairs.FEATURES.items() if k != "instruction"}
    features = pairs.tfds.features.FeaturesDict(kept)
    specs = features.get_serialized_info()
    values = pair._asdict() | {"input": io.BytesIO(pair.input), "output": io.BytesIO(pair.output)}
    example = features.encode_example({k: values[k] for k in kept})
    serializer = pairs.example_serializer.ExampleSerializer(specs)
    return serializer.get_tf_example(example).SerializeToString()


EMPTY_PNG = encode(np.zeros((1, 1, 3), np.uint8), "PNG").replace(
    b"\0\0\0\x01\0\0\0\x01\x08", b"\0\0\0\0\0\0\0\0\x08"
)
BROKEN = {
    "truncated JPEG": (lambda p: p._replace(input=p.input[:200]), ""),
    "flipped header": (lambda p: p._replace(output=b"\xfe" + p.output[1:]), "not a picture"),
    "0 x 0": (lambda p: p._replace(input=EMPTY_PNG), ""),
    "no field": (without_instruction, "has no field instruction"),
    "no instruction": (lambda p: p._replace(instruction=" "), "its instruction is empty"),
    "two sizes": (
        lambda p: p._replace(output=encode(picture(0, 0, (32, 40)))),
        "its pictures have two sizes, (40, 32) and (32, 40) px",
    ),
    "no record": (lambda p: b"\xff" * 40, "record"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_records_are_replaced_and_counted(packed, tmp_path, kind):
    """Record 5, of prompt 1, is the only one of its prompt that is broken."""
    change, reason = BROKEN[kind]
    folder = rewrite(packed, tmp_path / "d", lambda i, p: change(p) if i in (4, 5, 6) else p)
    batches = loader(folder)
    good = loader(packed)
    seen = [(next(batches), next(good)) for _ in range(9)]  # three epochs
    assert 1 <= len(batches.broken) <= 9 and not good.broken
    assert all(reason in why for why in batches.broken)
    for batch, whole in seen:
        same = (batch.input == whole.input).all(axis=(1, 2, 3))
        assert all(identify(x)[0] == 1 for x in whole.input[~same])
    assert sum(int((b.tokens != g.tokens).any(1).sum()) for b, g in seen) <= len(batches.broken)
    batches.close()


@pytest.fixture(scope="module")
def third(packed, tmp_path_factory) -> Path:
    """Every third record of the first shard is truncated."""
    folder = tmp_path_factory.mktemp("broken") / "third"
    cut = lambda i, p: p if i % 3 else p._replace(input=p.input[:99])  # noqa: E731
    return rewrite(packed, folder, cut)


def test_the_same_is_drawn_on_any_host_and_after_a_restart(third):
    whole = loader(third)
    straight = [next(whole) for _ in range(6)]
    assert len(whole.broken) > 3
    hosts = [loader(third, host=i, hosts=2) for i in range(2)]
    for batch in straight:
        rows = [next(host) for host in hosts]
        for name in batch._fields:
            parts = [getattr(row, name) for row in rows]
            np.testing.assert_array_equal(np.concatenate(parts), getattr(batch, name))
    assert sorted(hosts[0].broken + hosts[1].broken) == sorted(whole.broken)
    again = loader(third, start=4)
    np.testing.assert_array_equal(next(again).input, straight[4].input)
    workers = loader(third, workers=1)
    np.testing.assert_array_equal(next(workers).input, straight[0].input)
    for opened in (whole, *hosts, again, workers):
        opened.close()


def test_too_many_are_an_error(packed, third, tmp_path):
    batches = loader(third, broken=0.01)
    with pytest.raises(TooManyBroken, match=r"more than config.data.broken=0.01 of them: prompt"):
        for _ in range(100):
            next(batches)
    batches.close()
    few = rewrite(packed, tmp_path / "few", lambda i, p: p._replace(input=b"") if i == 0 else p)
    batches = loader(few, broken=0.01)
    for _ in range(100):
        next(batches)
    batches.close()
    assert batches.broken


def test_all_broken(packed, tmp_path):
    """Nothing is drawn for ever."""
    folder = rewrite(packed, tmp_path / "all", lambda i, p: p._replace(instruction=""))
    shards = json.loads((folder / "manifest.json").read_text())
    kept = shards["splits"]["train"][:1]
    for shard in shards["splits"]["train"][1:]:
        os.unlink(folder / shard["file"])
    shards["splits"]["train"] = kept
    (folder / "manifest.json").write_text(json.dumps(shards))
    with pytest.raises(TooManyBroken, match=f"{TRIES} records in a row cannot be used: .*empty"):
        next(loader(folder, threads=0))


def both(convert, pair):
    return pair._replace(input=convert(pair.input), output=convert(pair.output))


CONVERTED = {
    "CMYK": lambda data: with_mode(data, "CMYK", quality=100, subsampling=0),
    "RGBA": lambda data: with_mode(data, "RGBA", "PNG"),
    "grey": lambda data: with_mode(data, "L", "PNG"),
    "16 bits": lambda data: with_mode(with_mode(data, "L", "PNG"), "I;16", "PNG"),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_can_be_converted_is(packed, tmp_path, kind):
    convert = CONVERTED[kind]
    folder = rewrite(
        packed,
        tmp_path / "d",
        lambda i, p: p._replace(input=convert(p.input), output=convert(p.output)),
    )
    batches, good = loader(folder), loader(packed)
    for _ in range(3):
        batch, whole = next(batches), next(good)
        if kind in ("CMYK", "RGBA"):
            assert np.abs(batch.input.astype(int) - whole.input).max() <= 6
        np.testing.assert_array_equal(batch.tokens, whole.tokens)
    assert not batches.broken
    batches.close()
    good.close()


def test_pictures_are_turned_upright(packed, tmp_path):
    """EXIF says that both lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6

    def turned(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            encoded = io.BytesIO()
            image.rotate(90, expand=True).save(encoded, "PNG", exif=exif)
        return encoded.getvalue()

    folder = rewrite(
        packed,
        tmp_path / "d",
        lambda i, p: p._replace(input=turned(p.input), output=turned(p.output)),
    )
    batches, good = loader(folder), loader(packed)
    np.testing.assert_array_equal(next(batches).input, next(good).input)
    assert not batches.broken
    batches.close()
    good.close()


def test_long_texts_are_cut():
    """300 words: 77 tokens, the last the end's."""
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 77
    tokens = tokenize(tokenizer, ["a " * 300, "a"])
    assert tokens.shape == (2, 77) and tokens[0, -1] == tokenizer.eos_token_id
