# SPDX-License-Identifier: Apache-2.0
"""The inputs of the Prompt-to-Prompt golden files; what makes the files and what reads them agree.

Each `Case` is a pair of captions with settings of some of the controls.
"""

from typing import NamedTuple

import numpy as np
from transformers import CLIPTokenizer

from tests.oracles import CLIP_TOKENIZER

STEPS = 5
GUIDANCE = 3.0
SIDE, CHANNELS, WIDTH, TOKENS = 16, 4, 64, 77  # of the latents; of the text states
MAPS = 8  # side of the maps that the blend looks at
MOST = 64  # positions up to which self-attention is injected


class Case(NamedTuple):
    """One pair. Controls that are left alone do nothing."""

    first: str
    second: str
    swap: bool = False  # replacement, else refinement
    default: tuple[float, float] = (0.0, 0.0)  # window in which cross-attention is taken over
    words: dict[str, tuple[float, float]] = {}  # words of the second caption with their own
    scales: dict[str, float] = {}  # of words of the second caption
    inject: tuple[float, float] = (0.0, 0.0)  # window of injected self-attention
    p: float = 0.0  # of shared self-attention
    blend: tuple[list[str], list[str]] | None = None  # words of both captions
    threshold: float = 0.85


CAT = "a photograph of a cat on a mat"
CASES = {
    "swap": Case(CAT, CAT.replace("cat", "dog"), True, (0.0, 0.8)),
    "swap_longer": Case(CAT, CAT.replace("cat", "rhinoceros"), True, (0.2, 1.0)),
    "swap_word": Case(CAT, CAT.replace("cat", "dog"), True, (0.0, 1.0), {"dog": (0.0, 0.4)}),
    "refine": Case(CAT, "a photograph of a fluffy cat on a red mat", False, (0.0, 0.6)),
    "reweight": Case(CAT, CAT, True, (0.0, 1.0), scales={"cat": 3.0, "mat": -1.0}),
    "inject": Case(CAT, CAT.replace("cat", "dog"), inject=(0.0, 0.5)),
    "share": Case(CAT, CAT.replace("cat", "dog"), p=0.6),
    "blend": Case(CAT, CAT.replace("cat", "dog"), blend=(["cat"], ["dog"])),
    "all": Case(
        CAT,
        "a photograph of a sleeping dog on a mat",
        default=(0.2, 0.9),
        words={"mat": (0.0, 0.4)},
        scales={"sleeping": 2.0},
        inject=(0.4, 0.8),
        p=0.3,
        blend=(["cat"], ["sleeping", "dog"]),
    ),
}

CAPTIONS = {
    "same": (CAT, CAT),
    "fewer_tokens": ("a plate of lasagne here", "a plate of cake here"),
    "more_tokens": ("a lion is eating an apple", "a lovely-dog is eating an apple"),
    "both_long": ("a chihuahua in lederhosen!", "a rhinoceros in dungarees!"),
    "empty": ("", ""),
    "cut": ("a " * 90 + "cat", "a " * 90 + "cat"),
}
"""Equally many words in both, beside those of CASES."""

ADDED = {
    "front": ("a house", "an old castle-like house"),
    "repeated": ("a red red car", "a red car, a red red red car"),
    "shorter": ("a big red house by the sea at night", "a house by night"),
    "nothing": ("cat", "two dogs"),
    "full": ("a " * 90, "a cat " * 90),
}
"""Words added or taken away."""


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(CLIP_TOKENIZER, model_max_length=TOKENS)


def noise() -> np.ndarray:
    """Unit noise "h w c" that both pictures of every case start from."""
    return np.random.default_rng(0).normal(size=(SIDE, SIDE, CHANNELS)).astype(np.float32)


def states(name: str) -> np.ndarray:
    """Stand-ins for text states, "2 n c" of a case's captions; `null` gives two of no caption."""
    seed = ["null", *CASES].index(name) + 1
    return np.random.default_rng(seed).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)


def blended() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latents "4 16 16 4", maps "4 8 8 77", masks of words "4 77", thresholds "2"."""
    rng = np.random.default_rng(99)
    z = rng.normal(size=(4, SIDE, SIDE, CHANNELS)).astype(np.float32)
    maps = rng.gamma(0.3, size=(4, MAPS, MAPS, TOKENS)).astype(np.float32)
    words = np.zeros((4, TOKENS), np.float32)
    words[[0, 1, 1, 2, 3], [3, 3, 4, 7, 9]] = 1
    return z, maps, words, np.array([0.5, 0.9], np.float32)
