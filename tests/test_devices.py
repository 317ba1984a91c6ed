# SPDX-License-Identifier: Apache-2.0
"""Claims: parameters arrive on devices as they are in the file, turned round where XLA wants them
so, and the CPU's XLA takes the copy that was made of them as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax.devices import packed, put, shardings

KERNEL = np.random.default_rng(0).random((6, 20, 3, 3), np.float32)  # OIHW, as files have it
PARAMS = {
    "conv": np.moveaxis(KERNEL, (0, 1), (-1, -2)),
    "one_by_one": np.moveaxis(KERNEL[:, :, :1, :1], (0, 1), (-1, -2)),
    "linear": KERNEL[:, :, 0, 0],
    "scale": KERNEL[0, 0, 0],
    "number": np.asarray(0.5),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("devices", [1, 8])
def test_values_are_those_of_the_file(dtype, devices):
    there = put(PARAMS, dtype, shardings(jax.devices()[:devices]).replicated)
    for name, x in PARAMS.items():
        assert there[name].sharding.num_devices == devices
        np.testing.assert_array_equal(there[name], x.astype(dtype))


def test_the_cpu_copies_once():
    x = packed(PARAMS["conv"], np.float32)
    there = jax.device_put(x, shardings().replicated)
    assert x.flags.c_contiguous and not np.shares_memory(x, KERNEL)
    assert there.addressable_data(0).unsafe_buffer_pointer() == x.ctypes.data
