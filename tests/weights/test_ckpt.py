# SPDX-License-Identifier: Apache-2.0
"""Claims: torch's checkpoints are read exactly, in both layouts; nothing that they carry is run."""

import io
import os
import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p_jax.weights import ckpt

LAYOUTS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def write(path: Path, content, is_zip: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


@LAYOUTS
def test_tensors_of_every_kind(tmp_path, is_zip):
    base = torch.randn(4, 6)
    state = OrderedDict(
        plain=base,
        transposed=base.T,
        window=base[1:3, 2:4],
        repeated=torch.randn(3, 1).expand(3, 4),
        parameter=torch.nn.Parameter(torch.randn(3)),
        double=torch.randn(2, dtype=torch.float64),
        half=torch.randn(2).half(),
        brain=torch.randn(2, 3).bfloat16(),
        integer=torch.arange(5),
        boolean=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
    )
    read = ckpt.read(write(tmp_path / "a.ckpt", {"state_dict": state, "epoch": 3}, is_zip))
    assert list(read) == list(state)
    for name, x in state.items():
        x = x.detach()
        want = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
        assert read[name].shape == want.shape, name
        np.testing.assert_array_equal(np.asarray(read[name]).astype(want.dtype), want, name)
    assert read["brain"].dtype.name == "bfloat16"
    assert np.shares_memory(read["plain"], read["transposed"])
    bare = ckpt.read(write(tmp_path / "b.ckpt", state, is_zip))
    np.testing.assert_array_equal(bare["plain"], base)


@pytest.fixture
def lightning(monkeypatch):
    """A module that looks like pytorch_lightning's while a checkpoint is written."""

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    for kind in (ModelCheckpoint, AttributeDict):
        kind.__module__, kind.__qualname__ = name, kind.__name__
        setattr(module, kind.__name__, kind)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("callbacks"))
        patch.setitem(sys.modules, name, module)
        yield module
    assert name not in sys.modules


@LAYOUTS
def test_lightning_objects_stay_inert(tmp_path, lightning, is_zip):
    monitor = lightning.AttributeDict(a=1)
    monitor.b = 2
    content = {
        "epoch": 12,
        "global_step": 22000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            lightning.ModelCheckpoint: {
                "monitor": monitor,
                "best_model_score": np.float64(0.5),
                "current_score": torch.tensor(0.25),
            }
        },
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}}],
        "state_dict": OrderedDict(weight=torch.ones(2, 3)),
    }
    path = write(tmp_path / "a.ckpt", content, is_zip)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    np.testing.assert_array_equal(ckpt.read(path)["weight"], np.ones((2, 3)))
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@LAYOUTS
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "__builtin__.eval|builtins.eval"),
        (open, ("{}", "w"), "io.open"),
        (defaultdict, (int,), "collections.defaultdict"),
        (torch.load, ("{}",), "torch.serialization.load"),
    ],
)
def test_code_is_refused_by_name_and_not_run(tmp_path, function, args, name, is_zip):
    mark = tmp_path / "executed"
    evil = Calls(function, *(a.format(mark) if isinstance(a, str) else a for a in args))
    content = {"state_dict": {"weight": torch.ones(2)}, "callbacks": evil}
    with pytest.raises(ValueError, match=f"a.ckpt: asks for ({name}), .*: not loaded") as error:
        ckpt.read(write(tmp_path / "a.ckpt", content, is_zip))
    assert not mark.exists() and "\n" not in str(error.value)


def test_lightning_names_are_not_called(tmp_path):
    """A call of a lightning name makes an inert dict, whatever its arguments."""
    pickled = b"cpytorch_lightning.os\nsystem\n(Vtouch executed\ntR."
    assert ckpt.Unpickler(io.BytesIO(pickled)).load() == {}


class Nested(torch.nn.Module):
    """What TorchScript keeps of a module: parameters, buffers, constants, modules within."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2).half())
        self.register_buffer("size", torch.tensor(16))
        self.bare = torch.nn.Parameter(torch.randn(2, 3))
        self.numbers, self.shares, self.names = [1, 2], [0.5], {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.numbers[0] + self.shares[0] + self.names["a"]


def test_torchscript_archives(tmp_path):
    """The tensors of its modules are read; the archive's code need not even be code."""
    module = Nested()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(path := tmp_path / "a.pt", "w") as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, b"import os" if "/code/" in name else good.read(name))
    state, read = module.state_dict(), ckpt.read(path)
    assert read.keys() == state.keys()
    for name, x in state.items():
        assert read[name].dtype == x.numpy().dtype
        np.testing.assert_array_equal(read[name], x)


def scripted(*opcodes: bytes) -> bytes:
    return b"\x80\x02c__torch__.os\nsystem\n" + b"".join(opcodes) + b"."


def test_torchscript_names_are_not_called():
    """Calls of them make placeholders; one that contains itself is walked once."""
    called = ckpt.Unpickler(io.BytesIO(scripted(b"(Vtouch executed\ntR"))).load()
    assert type(called) is ckpt.Scripted and called.attributes == {}
    tensor = ckpt.Tensor(ckpt.Storage(np.dtype(np.float32), "0"), 0, (1,), (1,))
    called.attributes |= {"again": called, "weight": tensor, "text": "x"}
    assert ckpt.named_tensors(called) == [("weight", tensor)]
    with pytest.raises(ValueError, match="holds no state_dict of tensors"):
        ckpt.named_tensors(ckpt.Scripted())
    odd = scripted(b")\x81", b"K\x01b")  # its state is a number
    with pytest.raises(ckpt.DAMAGED):
        ckpt.Unpickler(io.BytesIO(odd)).load()


def forged(tmp_path: Path, storage: bytes, tensor: ckpt.Tensor) -> Path:
    """A zip checkpoint with one float storage and a tensor that claims a view of it."""
    good = write(tmp_path / "good.ckpt", {"state_dict": {"weight": torch.zeros(7, 5)[1:, 1:]}})
    with zipfile.ZipFile(good) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    pickled = files["good/data.pkl"]
    size, stride = b"K\x06K\x04\x86", b"K\x05K\x01\x86"
    assert pickled.count(size) == pickled.count(stride) == 1
    new = b"(" + b"".join(b"J" + n.to_bytes(4, "little", signed=True) for n in tensor.shape) + b"t"
    steps = b"(" + b"".join(b"J" + n.to_bytes(4, "little", signed=True) for n in tensor.strides)
    files["good/data.pkl"] = pickled.replace(size, new).replace(stride, steps + b"t")
    files["good/data/0"] = storage
    path = tmp_path / "forged.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("shape", "strides", "size"),
    [
        ((6, 4), (5, 1), 100),  # the storage is shorter than the tensor
        ((600, 4), (5, 1), 140),
        ((6, 4), (-5, 1), 140),
        ((-6, 4), (5, 1), 140),
        ((6, 4), (2**30, 1), 140),
        ((6, 4, 2), (5, 1), 140),
    ],
)
def test_views_outside_of_the_storage_are_refused(tmp_path, shape, strides, size):
    good = ckpt.Tensor(ckpt.Storage(np.dtype(np.float32), "0"), 6, (6, 4), (5, 1))
    assert ckpt.read(forged(tmp_path, b"\0" * 140, good))["weight"].shape == (6, 4)
    bad = ckpt.Tensor(good.storage, 6, shape, strides)
    with pytest.raises(ValueError, match="forged.ckpt: a tensor of shape"):
        ckpt.read(forged(tmp_path, b"\0" * size, bad))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"{}", b"PK\x03\x04", pickle.dumps([1, 2]), pickle.dumps({"state_dict": {}})],
    ids=["empty", "text", "json", "half a zip", "list", "no tensors"],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.ckpt: not a") as error:
        ckpt.read(path)
    assert "\n" not in str(error.value)


@LAYOUTS
def test_truncated_checkpoints_are_one_line(tmp_path, is_zip):
    path = write(tmp_path / "a.ckpt", {"state_dict": {"weight": torch.randn(100, 100)}}, is_zip)
    data = path.read_bytes()
    for size in (len(data) // 4, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="a.ckpt: "):
            ckpt.read(path)


def test_a_state_dict_without_tensors(tmp_path):
    path = write(tmp_path / "a.ckpt", {"state_dict": {"epoch": 3}})
    with pytest.raises(ValueError, match="a.ckpt: holds no state_dict of tensors"):
        ckpt.read(path)
