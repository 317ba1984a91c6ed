# SPDX-License-Identifier: Apache-2.0
"""Claims, at full SD 1.5 size: a folder opens in seconds and uncopied; LDM round trips exactly."""

import resource
import time

import jax
import numpy as np
import pytest

from ip2p_jax.models.presets import SD15
from ip2p_jax.weights.load import load
from ip2p_jax.weights.port import leaves
from ip2p_jax.weights.save import save_ldm

pytestmark = pytest.mark.slow


def test_full_size(full_ip2p, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    model = load(str(full_ip2p))
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
    assert model.config == SD15.widened()
    assert sum(x.size for _, x in leaves(model.params["unet"])) == 859_532_484
    save_ldm(model, tmp_path / "a.safetensors")
    again = load(str(tmp_path / "a.safetensors"))
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
