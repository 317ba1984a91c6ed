# SPDX-License-Identifier: Apache-2.0
"""Claims: imports point down only; no torch or TensorFlow in the library; jax only when needed.

entry points -> editor, training, evaluation -> weights -> models, diffusion, data -> base.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("types", "config", "sizes", "cli", "storage", "digests", "programs", "models.presets"),
    ("models", "diffusion", "data"),
    ("weights", "networks", "guided", "checks", "devices"),
    (
        "editor",
        "generator",
        "placed",
        "jobs",
        "edit_requests",
        "latent_shards",
        "publish",
        "safety",
        "tpu",
        "training",
        "evaluation",
    ),
)
"""Modules and packages of ip2p_jax, lowest first; above all are the entry points."""

APART = LAYERS[1]  # these meet only above
BANNED = ("torch", "torchvision", "diffusers", "accelerate", "tensorflow")


def sources(*folders: str) -> dict[str, str]:
    """The source of every module in `folders`, by dotted name."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {n: file.read_text("utf-8") for n, file in zip(names, files, strict=True)}


def imported(source: str) -> Iterator[str]:
    """Dotted names of all that a source imports, wherever in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def group(module: str) -> tuple[int, str]:
    """The layer of a module of ip2p_jax, and its package there; entry points are above all."""
    name = module.removeprefix("ip2p_jax.")
    for layer, members in enumerate(LAYERS):
        for member in members:
            if name == member or name.startswith(member + "."):
                return layer, member
    return len(LAYERS), name.split(".")[0]


def faults(module: str, source: str) -> list[str]:
    """The imports of a module of ip2p_jax that do not point down."""
    found = []
    layer, package = group(module)
    for name in imported(source):
        if name.split(".")[0] in (*BANNED, "data_gen", "configs", "examples", "benchmarks"):
            found.append(f"{module} imports {name}")
        elif name.startswith("ip2p_jax."):
            other, target = group(name)
            sideways = other == layer and package != target
            apart = package in APART or layer == len(LAYERS)
            if other > layer or sideways and apart:
                found.append(f"{module} imports {name}")
    return found


LIBRARY = sources("ip2p_jax")


def test_imports_point_down():
    modules = {name: x for name, x in LIBRARY.items() if name != "ip2p_jax.__init__"}
    assert len(modules) > 30
    assert [fault for name, x in modules.items() for fault in faults(name, x)] == []


def test_what_is_above_are_entry_points():
    """A module that no layer names can be run: new ones have to be put in their place."""
    above = [name for name in LIBRARY if group(name)[0] == len(LAYERS)]
    above.remove("ip2p_jax.__init__")
    assert {f"ip2p_jax.{name}" for name in ("edit", "generate", "train", "convert")} <= set(above)
    for name in above:
        assert '\nif __name__ == "__main__":\n' in LIBRARY[name], name
        assert "@one_line_errors\ndef main(" in LIBRARY[name], name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ip2p_jax.models.unet", "from ip2p_jax.diffusion.grids import grid"),
        ("ip2p_jax.diffusion.grids", "def f():\n    import ip2p_jax.models.unet"),
        ("ip2p_jax.diffusion.grids", "from ip2p_jax import models"),
        ("ip2p_jax.data.loader", "from ip2p_jax.weights.load import load"),
        ("ip2p_jax.weights.load", "from ip2p_jax.editor import Editor"),
        ("ip2p_jax.types", "from ip2p_jax.data import pictures"),
        ("ip2p_jax.editor", "from ip2p_jax.train import main"),
        ("ip2p_jax.edit", "from ip2p_jax.train import main"),
        ("ip2p_jax.weights.ckpt", "import torch.utils"),
        ("ip2p_jax.data.pairs", "from tensorflow import io"),
        ("ip2p_jax.train", "from data_gen.edits import EDITS"),
    ],
)
def test_control_wrong_imports_are_found(module, source):
    assert len(faults(module, source)) == 1
    assert faults(module, "import jax\nfrom ip2p_jax import types") == []


def test_the_package_itself_imports_nothing():
    """`Editor` comes when it is asked for, or for type checkers only."""
    tree = ast.parse(LIBRARY["ip2p_jax.__init__"])
    top = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(x) for x in top] == ["import os", "from typing import TYPE_CHECKING"]
    assert {x for x in imported(LIBRARY["ip2p_jax.__init__"]) if "ip2p" in x} == {
        "ip2p_jax.editor.Editor"
    }


def test_neither_torch_nor_tensorflow():
    """Nor do configurations import more than what they are made of."""
    for name, source in sources("data_gen", "configs", "examples").items():
        found = set(imported(source))
        assert not {x.split(".")[0] for x in found} & set(BANNED), name
        if name.startswith("configs."):
            allowed = ("ip2p_jax.config.", "ip2p_jax.models.presets.", "configs.")
            assert all(x.startswith(allowed) for x in found), name


def test_what_is_loaded_at_run_time():
    """`import ip2p_jax` is cheap; the entry points do, without a word, without torch."""
    script = """
import sys
import ip2p_jax
assert "jax" not in sys.modules
sys.modules.update(torch=None, diffusers=None)  # importing them fails
import ip2p_jax.edit, ip2p_jax.generate, ip2p_jax.convert, ip2p_jax.train
assert "tensorflow" not in sys.modules
assert ip2p_jax.Editor is ip2p_jax.editor.Editor
"""
    env = {k: x for k, x in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
