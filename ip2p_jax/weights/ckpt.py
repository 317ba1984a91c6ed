# SPDX-License-Identifier: Apache-2.0
"""torch's `.ckpt` files, read without torch and without running what they carry.

A checkpoint is a pickle, and a pickle names functions to call. This unpickler knows a fixed list of
names, each bound to something of ours; names from pytorch_lightning become inert dicts, and
modules of a TorchScript archive the bare list of what they hold: their code is neither read nor
called. Every other name is refused. Tensors are views of the mapped file.
Both of torch's layouts are read: a zip archive (since 1.6) and the older sequence of pickles.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,  # zip features that torch does not use, endless nesting
    UnicodeDecodeError,
)


@dataclass(frozen=True)
class Storage:
    """A storage by the key under which the file holds its bytes."""

    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class Tensor:
    """A view into a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, data: np.ndarray) -> np.ndarray:
        """The array within `data`, the storage's elements; never reaches outside of it."""
        if len(self.shape) != len(self.strides) or min((0, self.offset, *self.shape)) < 0:
            raise ValueError(f"a tensor of shape {self.shape} has strides {self.strides}")
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min((0, *self.strides)) < 0 or 0 not in self.shape and self.offset + last >= data.size:
            raise ValueError(f"a tensor of shape {self.shape} reaches outside of its storage")
        if 0 in self.shape:
            return np.empty(self.shape, data.dtype)
        strides = [s * data.itemsize for s in self.strides]
        view = data[self.offset :]
        return np.lib.stride_tricks.as_strided(view, self.shape, strides, writeable=False)


class Inert(dict):
    """Stands for an object of pytorch_lightning: takes whatever it is given and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class Scripted:
    """Stands for a module of a TorchScript archive: holds its attributes and does nothing."""

    def __new__(cls, *args):
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state):
        self.attributes = dict(state)


def rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def rebuild_parameter(tensor, *_) -> Tensor:
    """`torch._utils._rebuild_parameter`."""
    return tensor


def numpy_dtype(name: str, *_) -> np.dtype:
    """`numpy.dtype`, plain numbers only."""
    dtype = np.dtype(str(name))
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"numpy type {name}")
    return dtype


def numpy_scalar(dtype: np.dtype, data: bytes) -> Any:
    """`numpy.core.multiarray.scalar`."""
    return np.frombuffer(data, dtype, 1)[0]


def latin1(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which old pickles hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


def typed(value: Any, *_) -> Any:
    """`torch.jit._pickle`, which says of what type lists and dicts are."""
    return value


TYPED = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "numpy.dtype": numpy_dtype,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy._core.multiarray.scalar": numpy_scalar,
    "_codecs.encode": latin1,
    **{f"torch.jit._pickle.{name}": typed for name in (*TYPED, "restore_type_tag")},
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
}


class Unpickler(pickle.Unpickler):
    """Knows the names in `ALLOWED` and nothing else; collects the storages it meets."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("pytorch_lightning", "lightning"):
            return Inert
        if module.split(".")[0] == "__torch__":
            return Scripted
        if f"{module}.{name}" not in ALLOWED:
            raise ValueError(f"asks for {module}.{name}, which no checkpoint needs: not loaded")
        return ALLOWED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(x is not None for x in view):
            raise pickle.UnpicklingError("a persistent object that is not a storage")
        return self.storages.setdefault(str(key), Storage(dtype, str(key)))


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint's `state_dict`, or of the file itself where it is one.

    Of a TorchScript archive (`torch.jit.save`) these are the tensors of its module.

    Raises:
      ValueError: the file asks for code, or is not a sound checkpoint; nothing has been executed.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content, places = read_zip(file) if is_zip else read_legacy(file)
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        tensors = {}
        for name, tensor in named_tensors(content):
            data = raw[places[tensor.storage.key]].view(tensor.storage.dtype)
            tensors[name] = tensor.view(data)
        return tensors
    except DAMAGED as error:
        raise ValueError(f"{path}: not a sound torch checkpoint ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def named_tensors(content: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a state dict, which Lightning keeps among other things."""
    if isinstance(content, Scripted):
        named = scripted_tensors(content)
    else:
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        named = [(str(k), x) for k, x in state.items() if isinstance(x, Tensor)] if state else []
    if not named:
        raise ValueError("holds no state_dict of tensors")
    return named


def scripted_tensors(module: Scripted, prefix: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of a scripted module and, by dotted names, of those within it."""
    named, attributes = [], module.attributes
    module.attributes = {}  # a module that is met again is empty, so that the walk ends
    for name, x in attributes.items():
        if isinstance(x, Tensor):
            named.append((f"{prefix}{name}", x))
        elif isinstance(x, Scripted):
            named += scripted_tensors(x, f"{prefix}{name}.")
    return named


def read_zip(file: BinaryIO) -> tuple[Any, dict[str, slice]]:
    """The archive since torch 1.6: one pickle, and the storages uncompressed beside it.

    Returns the unpickled content and where in the file each storage lies.
    """
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    root = next((n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")), None)
    if root is None:
        raise ValueError("a zip archive without data.pkl, so not a torch checkpoint")
    order = members.get(f"{root}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise ValueError("written on a big-endian machine")
    with archive.open(f"{root}data.pkl") as stream:
        reader = Unpickler(stream)
        content = reader.load()
    places = {}
    for key in reader.storages:
        info = members[f"{root}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} is compressed, which torch does not do")
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name + extra
        places[key] = slice(start, start + info.file_size)
    return content, places


def read_legacy(file: BinaryIO) -> tuple[Any, dict[str, slice]]:
    """The layout before torch 1.6: magic, protocol, system, content, keys; then the storages."""
    if Unpickler(file).load() != LEGACY_MAGIC or Unpickler(file).load() != 1001:
        raise ValueError("not a torch checkpoint")
    if not Unpickler(file).load()["little_endian"]:
        raise ValueError("written on a big-endian machine")
    reader = Unpickler(file)
    content, keys = reader.load(), Unpickler(file).load()
    places, end = {}, file.seek(0, 1)
    size = file.seek(0, 2)
    for key in map(str, keys):
        file.seek(end)
        (count,) = struct.unpack("<q", file.read(8))
        start, end = end + 8, end + 8 + count * reader.storages[key].dtype.itemsize
        if count < 0 or end > size:
            raise ValueError("truncated")
        places[key] = slice(start, end)
    return content, places
