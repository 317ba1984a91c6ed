# SPDX-License-Identifier: Apache-2.0
"""What tells one model, and one test set, from another of the same name: short digests."""

import hashlib
import json
from pathlib import Path

import numpy as np

from ip2p_jax.data.manifest import MANIFEST, sha256
from ip2p_jax.evaluation.examples import ExampleSet
from ip2p_jax.types import Params
from ip2p_jax.weights.port import leaves

PART = 6
"""Of each dimension of an array so many places are looked at: gigabytes need not be read."""


def weights_digest(params: Params) -> str:
    """A digest of names, shapes and evenly spaced values of parameters (on the host)."""
    digest = hashlib.sha256()
    for path, x in leaves(params):
        places = tuple(slice(None, None, max(1, side // PART)) for side in x.shape)
        digest.update(f"{path}{x.shape}{x.dtype}".encode())
        digest.update(np.ascontiguousarray(np.asarray(x[places])).tobytes())
    return digest.hexdigest()[:16]


def set_digest(path: str, examples: ExampleSet) -> str:
    """A digest of a set's manifest, or else of the names and texts of its examples."""
    manifest = Path(path) / MANIFEST
    if manifest.is_file():
        return sha256(manifest)[:16]
    texts = [
        (step.name, step.instruction, step.input_caption, step.output_caption)
        for plan in examples.plans
        for step in plan.steps
    ]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
