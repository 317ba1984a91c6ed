# SPDX-License-Identifier: Apache-2.0
"""safetensors files: read by memory map, written tensor by tensor.

The library checks a header (and reads numpy arrays into memory); what is here spares the copies and
adds bfloat16, so that gigabytes open at once and are written with the memory of one tensor.
"""

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ip2p_jax.cli import atomic_path

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (tensors, metadata) of a file; the tensors are read-only views of the mapped file.

    Raises:
      ValueError: the file is truncated, its header is not sound, or a type is not known here.
    """
    try:
        with safe_open(path, framework="np"):  # sizes, overlaps, offsets beyond the end
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a sound safetensors file ({error})") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, "r", 8 + size) if header else np.empty(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}, which is not read here")
        raw = np.asarray(data[slice(*entry["data_offsets"])])
        tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: np.dtype,
    metadata: Mapping[str, str],
    progress: Callable[[int], object],
) -> None:
    """Writes `tensors`, floats as `dtype`; calls `progress` with the bytes of each.

    Raises:
      ValueError: a finite value becomes infinite in `dtype`; names the tensor.
    """
    kept = {n: dtype if x.dtype in FLOATS else x.dtype for n, x in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kept[name].itemsize, name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        start, end = end, end + prod(tensors[name].shape) * kept[name].itemsize
        header[name] = {
            "dtype": NAMES[kept[name]],
            "shape": tensors[name].shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = cast(name, tensors[name], kept[name])
            file.write(data.reshape(-1).view(np.uint8).data)
            progress(data.nbytes)
        file.flush()
        os.fsync(file.fileno())


def cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` as `dtype`, contiguous; refuses values beyond the type's range."""
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(x, dtype)
    if dtype.itemsize < x.dtype.itemsize and np.isinf(data).any() and not np.isinf(x).any():
        raise ValueError(f"{name} has values beyond the range of {dtype}")
    return data
