# SPDX-License-Identifier: Apache-2.0
"""Self-attention of many positions on TPUs, whose scores never reach memory (Dao et al. 2022).

The kernel is JAX's own, splash attention. It computes one device's rows: `shard_map` gives it
those, for XLA cannot split a kernel. Everything else attends as `ip2p_jax.models.attention` does.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ip2p_jax.models.attention import Attend, Place, attend

LEAST = 1024
"""Positions from which on the kernel is used: below, the scores are few."""
BLOCKS = (1024, 512, 256, 128)
"""Positions that the kernel takes at once: the first that divides them all."""


def attend_on(sharding: NamedSharding) -> Attend:
    """How networks attend on the devices of a sharding, over all of which rows are split."""
    on_tpu = all(device.platform == "tpu" for device in sharding.device_set)
    return flash_attend(sharding.mesh) if on_tpu else attend


def flash_attend(mesh: Mesh | AbstractMesh, *, interpret: bool = False) -> Attend:
    """`attend` with the kernel where it serves: among a picture's own positions, in bfloat16, where
    each device has as many rows.

    `interpret` computes the kernel anywhere, in any type, slowly: for tests.
    """
    rows = PartitionSpec(mesh.axis_names)

    def flash(
        place: Place | None,
        q: Float[Array, "b n k d"],
        k: Float[Array, "b m k d"],
        v: Float[Array, "b m k d"],
    ) -> Float[Array, "b n k d"]:
        block, even = block_of(q.shape[1]), q.shape[0] % mesh.size == 0
        served = even and (q.dtype == jnp.bfloat16 or interpret)
        if place is None or place.cross or block is None or not served:
            return attend(place, q, k, v)
        kernel = functools.partial(on_a_device, block=block, interpret=interpret)
        split = jax.shard_map(
            kernel, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False
        )
        return split(q, k, v)

    return flash


def block_of(positions: int) -> int | None:
    """How many positions the kernel takes at once; None where it does not serve."""
    if positions < LEAST:
        return None
    return next((block for block in BLOCKS if positions % block == 0), None)


def on_a_device(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    block: int,
    interpret: bool,
) -> Float[Array, "b n k d"]:
    """softmax(q k^T / sqrt(d)) v of one device's rows."""
    kernel = make_kernel(q.shape[2], q.shape[1], k.shape[1], block, interpret)
    by_head = (rearrange(x, "b n k d -> b k n d") for x in (q * q.shape[-1] ** -0.5, k, v))
    return rearrange(jax.vmap(kernel)(*by_head), "b k n d -> b n k d")


def make_kernel(heads: int, queries: int, keys: int, block: int, interpret: bool) -> Callable:
    """The kernel for one row; its gradient is one kernel, too."""
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )
    everything = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
    return splash.make_splash_mha(
        everything, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
