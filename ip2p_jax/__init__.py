# SPDX-License-Identifier: Apache-2.0
"""InstructPix2Pix in JAX/Flax: edit pictures by instruction, make data, train, measure."""

import os
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there, say

if TYPE_CHECKING:
    from ip2p_jax.editor import Editor

__all__ = ["Editor"]


def __getattr__(name: str):
    """Imports `Editor` when it is first asked for: entry points set JAX up before that."""
    if name == "Editor":
        from ip2p_jax.editor import Editor

        return Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
