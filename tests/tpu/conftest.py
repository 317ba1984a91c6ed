# SPDX-License-Identifier: Apache-2.0
"""Programs compiled for TPUs here, by libtpu.

It is kept where only these tests find it: with it every start of JAX looks for a TPU around.
"""

import sys

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ip2p_jax.devices import shardings
from ip2p_jax.tpu.topologies import Topology, topology, use_cpu

sys.path.append(f"{sys.prefix}/libtpu")


@pytest.fixture(scope="session")
def v4() -> Topology:
    """Four chips."""
    use_cpu()
    return topology("v4-8")


@pytest.fixture(scope="session")
def chip(v4: Topology) -> NamedSharding:
    """One of them."""
    sharding = shardings(v4.devices[:1]).replicated
    assert sharding.spec == PartitionSpec() and len(jax.devices()) == 8  # those of the CPU
    return sharding
