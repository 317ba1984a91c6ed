# SPDX-License-Identifier: Apache-2.0
"""Claims: slices have the chips that their names say; wrong names are told what is known; options
are the compiler's, and those that it does not know are refused."""

import jax
import jax.numpy as jnp
import pytest

from ip2p_jax.config import Mesh
from ip2p_jax.programs import compiled_anew
from ip2p_jax.tpu import options
from ip2p_jax.tpu.topologies import CHIPS, chip_of, shape_of, topology, use_cpu
from ip2p_jax.training.mesh import make_mesh
from ip2p_jax.training.utilisation import PEAK


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "kind"),
    [
        ("v4-32", 16, 4, "TPU v4"),
        ("v4:2x2x4", 16, 4, "TPU v4"),
        ("v5p-8", 4, 1, "TPU v5"),
        ("v5e-16", 16, 4, "TPU v5 lite"),
        ("v6e-8", 8, 2, "TPU v6 lite"),
        ("v6e-1", 1, 1, "TPU v6 lite"),
        ("v4-128", 64, 16, "TPU v4"),
    ],
)
def test_a_slice_has_the_chips_of_its_name(name, chips, hosts, kind):
    use_cpu()
    slice_ = topology(name)
    assert len(slice_.devices) == chips and slice_.devices[0].device_kind == kind
    assert len({device.process_index for device in slice_.devices}) == hosts
    assert topology(name) is slice_  # two descriptions would have unequal devices
    assert chip_of(slice_.devices[0]) is slice_.chip
    assert make_mesh(Mesh(data=1, fsdp=-1), slice_.devices).shape == {"data": 1, "fsdp": chips}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v3-8", "expected v4, v5e, v5p, v6e and -N"),
        ("v4", "expected v4, v5e, v5p, v6e and -N"),
        ("v4-10", "expected one of v4-2, v4-8, v4-16"),
        ("v5e-32x", "expected v4, v5e"),
        ("v5e:2x2x2", "expected a shape like v5e:4x4"),
        ("v4:2x2", "expected a shape like v4:2x2x4"),
    ],
)
def test_wrong_names_are_told_what_is_known(name, said):
    with pytest.raises(ValueError, match=said):
        shape_of(name)


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "ip2p_jax\[tpu\]"'):
        topology("v4-64")


def test_peaks_are_those_of_the_chips():
    assert PEAK["TPU v5 lite"] == CHIPS["v5e"].peak == 197e12
    assert chip_of(jax.devices()[0]) is None


def test_options_depend_on_the_devices(chip):
    """Not on what jax computes on, which is the CPU here. Control: the compiler refuses others."""
    device, cpu = next(iter(chip.device_set)), jax.devices()[0]
    assert options.compiler_options(cpu, "blocks") == options.APART
    assert options.compiler_options(cpu) is None
    assert options.compiler_options(device, "blocks") is None
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=chip)
    lowered = jax.jit(lambda x: x + 1).lower(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_none'"):
        with compiled_anew():
            lowered.compile(compiler_options={"xla_tpu_none": "true"})


def test_memory_is_what_the_compiler_says(v4, chip):
    x = jax.ShapeDtypeStruct((2**35,), jnp.bfloat16, sharding=chip)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"available HBM \(30.75G\)"):
        jax.jit(lambda x: x + 1).lower(x).compile()
    assert v4.chip.memory == 30.75 * 2**30
