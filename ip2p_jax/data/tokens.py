# SPDX-License-Identifier: Apache-2.0
"""Texts as CLIP's tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32


def tokenize(tokenizer: Any, texts: Sequence[str], positions: int = 77) -> Int32[np.ndarray, "b n"]:
    """CLIP tokens, cut or padded (by the tokenizer's own pad token) to the text tower's length.

    That is `positions`, or the tokenizer's own limit where it is smaller. ValueError for no texts.
    """
    if not len(texts):
        raise ValueError("no texts to tokenize, expected one at least")
    length = min(tokenizer.model_max_length, positions)
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length).input_ids
    return np.array(ids, np.int32)
