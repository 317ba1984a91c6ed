# SPDX-License-Identifier: Apache-2.0
"""Eight fake devices, no network, one compilation cache for tests and the processes they start."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".cache" / "jax")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Most tests spend their time compiling, so they do it quickly; heavy ones do it well."""
    if config.option.markexpr != "heavy":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"


LONG = (
    "test_train_faults.py",
    "test_train.py",
    "test_train_kinds.py",
    "test_lora.py",
    "test_pairs.py",
    "test_evaluate.py",
    "test_editor.py",
)
"""Files that take minutes begin first, so that of several processes none has to wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny_ip2p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in the shape of `presets.TINY` with 8 input channels, random weights."""
    from tests.oracles import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny_ip2p"), in_channels=8)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 4 input channels: what InstructPix2Pix starts from."""
    from tests.oracles import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny_sd"), in_channels=4)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers' CLIPModel, random weights."""
    from tests import oracles

    return oracles.tiny_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def full_ip2p(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A diffusers folder in full SD 1.5 shape with 8 input channels (4.3 GB): for slow tests."""
    from tests.oracles import full_folder

    folder = full_folder(tmp_path_factory.mktemp("full_ip2p"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts of 4 pairs: 36 in train (3 shards), 2 in validation, 2 in test."""
    from data_gen.pack import pack
    from tests.data.released import write_released

    folder = tmp_path_factory.mktemp("data")
    pack([write_released(folder / "released", 40)], folder / "packed", shard_size=15)
    return folder / "packed"
