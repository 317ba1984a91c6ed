# SPDX-License-Identifier: Apache-2.0
"""Claims: files are exchanged exactly with the safetensors library; hostile ones take one line."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from ip2p_jax.weights.tensor_file import read, write


def test_reads_what_the_library_writes(tmp_path):
    state = {
        "a": torch.randn(3, 4),
        "b": torch.randn(2).half(),
        "c": torch.randn(2, 2).bfloat16(),
        "d": torch.arange(3),
        "e": torch.tensor(1.5),
        "f": torch.zeros(0, 2),
        "g": torch.tensor([True, False]),
    }
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    got, metadata = read(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"} and got.keys() == state.keys()
    for name, x in state.items():
        assert got[name].shape == x.shape
        np.testing.assert_array_equal(np.asarray(got[name], np.float64), x.double().numpy())
    assert not got["a"].flags.writeable and not got["a"].flags.owndata


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_library_reads_what_we_write(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "b.transposed": rng.standard_normal((4, 3)).astype(np.float32).T,
        "a": rng.standard_normal(5).astype(np.float32),
        "position_ids": np.arange(7)[None],
        "scalar": np.full((), 3.0, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    counts = []
    path = tmp_path / "a.safetensors"
    write(path, tensors, np.dtype(dtype), {"key": "value"}, counts.append)
    got = safetensors.torch.load_file(path)
    assert got.keys() == tensors.keys()
    for name, x in tensors.items():
        want = x if x.dtype == np.int64 else x.astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(got[name].double().numpy(), want)
    assert sum(counts) == sum(x.numel() * x.element_size() for x in got.values())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "value"}
    assert read(path)[0].keys() == tensors.keys()


def test_a_value_beyond_the_type_is_refused_and_nothing_is_left(tmp_path):
    tensors = {"fine": np.ones(2, np.float32), "large": np.array([1e6], np.float32)}
    with pytest.raises(ValueError, match="large has values beyond the range of float16"):
        write(tmp_path / "a.safetensors", tensors, np.dtype(np.float16), {}, lambda count: None)
    assert not list(tmp_path.iterdir())


def forge(path: Path, header: object, data: bytes = b"\0" * 16, size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": ENTRY}, 2**62),
        ({"a": ENTRY}, 10),
        ({"a": {**ENTRY, "data_offsets": [0, 32]}}, None),
        ({"a": {**ENTRY, "data_offsets": [16, 0]}}, None),
        ({"a": {**ENTRY, "shape": [2**40]}}, None),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, None),
        ({"a": {**ENTRY, "shape": [-4]}}, None),
        ({"a": {**ENTRY, "dtype": "F1024"}}, None),
        ({"a": ENTRY, "b": ENTRY}, None),
        (b"[" * 100_000, None),
        (b"\x80\x04cposix\nsystem\n", None),
        ([1, 2], None),
        ({"__metadata__": {"a": 1}, "a": ENTRY}, None),
    ],
)
def test_hostile_headers(tmp_path, header, size):
    good = forge(tmp_path / "good.safetensors", {"a": ENTRY})
    assert read(good)[0]["a"].shape == (4,)
    bad = forge(tmp_path / "bad.safetensors", header, size=size)
    with pytest.raises(ValueError, match="bad.safetensors: not a sound safetensors file") as error:
        read(bad)
    assert "\n" not in str(error.value)


def test_truncated(tmp_path):
    path = forge(tmp_path / "a.safetensors", {"a": ENTRY})
    data = path.read_bytes()
    for size in (0, 4, 8, 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="a.safetensors: not a sound safetensors file"):
            read(path)


def test_a_type_that_is_not_read_is_named(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}
    with pytest.raises(ValueError, match="a has type F8_E4M3"):
        read(forge(tmp_path / "a.safetensors", {"a": entry}))
