# SPDX-License-Identifier: Apache-2.0
"""What tells one test set from another of the same name: a short digest."""

import hashlib
import json
from pathlib import Path

from ip2p_jax.data.manifest import MANIFEST, sha256
from ip2p_jax.evaluation.examples import ExampleSet


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
