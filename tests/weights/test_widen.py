# SPDX-License-Identifier: Apache-2.0
"""Claims: widening adds zero channels behind the old ones and changes nothing else."""

import jax
import numpy as np
import pytest

from ip2p_jax.models.presets import TINY
from ip2p_jax.weights.load import load
from ip2p_jax.weights.port import leaves
from ip2p_jax.weights.widen import widen
from tests.oracles import tiny_folder


def test_widen(tiny_sd):
    narrow = load(str(tiny_sd))
    wide = widen(narrow)
    assert wide.config == TINY.widened()
    old, new = (p.params["unet"]["conv_in"] for p in (narrow, wide))
    assert new["kernel"].shape == (3, 3, 8, 32)
    np.testing.assert_array_equal(new["kernel"][:, :, :4], old["kernel"])
    assert not new["kernel"][:, :, 4:].any() and old["kernel"].all()
    np.testing.assert_array_equal(new["bias"], old["bias"])
    assert old["bias"].all()
    rest = dict(leaves(wide.params))
    for path, x in leaves(narrow.params):
        if path != ("unet", "conv_in", "kernel"):
            assert rest[path] is x
    assert jax.tree.structure(wide.params) == jax.tree.structure(narrow.params)


def test_a_wide_model_stays(tiny_ip2p):
    model = load(str(tiny_ip2p))
    assert widen(model) is model


def test_other_widths_are_refused(tmp_path):
    inpainting = load(str(tiny_folder(tmp_path, in_channels=9)))
    with pytest.raises(ValueError, match=r"conv_in.weight \(32, 9, 3, 3\) cannot be widened"):
        widen(inpainting)
