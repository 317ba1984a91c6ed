# SPDX-License-Identifier: Apache-2.0
"""One packed data folder for all tests that only read."""

from pathlib import Path

import pytest

from data_gen.pack import pack
from tests.data.released import write_released


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """40 prompts of 4 pairs: 36 in train (3 shards), 2 in validation, 2 in test."""
    folder = tmp_path_factory.mktemp("data")
    pack([write_released(folder / "released", 40)], folder / "packed", shard_size=15)
    return folder / "packed"
