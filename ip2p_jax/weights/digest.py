# SPDX-License-Identifier: Apache-2.0
"""What tells the weights of one model from those of another of the same name: short digests."""

import hashlib

import numpy as np

from ip2p_jax.models.vae import ENCODER
from ip2p_jax.types import Params
from ip2p_jax.weights.port import leaves

PART = 6
"""Of each dimension of an array so many places are looked at: gigabytes need not be read."""


def weights_digest(params: Params) -> str:
    """A digest of names, shapes and evenly spaced values of parameters, wherever they are."""
    digest = hashlib.sha256()
    for path, x in leaves(params):
        places = tuple(slice(None, None, max(1, side // PART)) for side in x.shape)
        digest.update(f"{path}{x.shape}{x.dtype}".encode())
        digest.update(np.ascontiguousarray(np.asarray(x[places])).tobytes())
    return digest.hexdigest()[:16]


def encoder_digest(vae: Params) -> str:
    """A digest of the half of a VAE that makes latents: another decoder may go with them."""
    return weights_digest({part: vae[part] for part in ENCODER})
