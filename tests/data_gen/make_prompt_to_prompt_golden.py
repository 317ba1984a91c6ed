# SPDX-License-Identifier: Apache-2.0
"""Writes golden/prompt_to_prompt.npz, what Hertz et al. 2022 define, in torch and numpy.

  python -m tests.data_gen.make_prompt_to_prompt_golden

Shares no code with data_gen: maps are written out and edited as matrices in diffusers' UNet, words
are found by the tokenizer's character offsets, alignments by the recursion from the other end. The
paper's code is followed where it is right; it is not in four things. After a word swap that changes
the number of tokens it pairs the tokens that follow with their neighbours; in a refinement to fewer
tokens it pairs padding with words; and what its maps record are, by aliasing, edited maps, where
algorithm 1 has the pictures' own. Its windows count steps as int(share * (steps + 1)), those of
self-attention as int(share * steps): here i / steps < share for both. It re-weights in the window
only; the formula has no window, and here there is none.
"""

import functools
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from tests.data_gen.pair_cases import (
    ADDED,
    CAPTIONS,
    CASES,
    GUIDANCE,
    MAPS,
    MOST,
    STEPS,
    TOKENS,
    Case,
    blended,
    noise,
    states,
    tokenizer,
)
from tests.oracles import TINY_UNET, randomize

FILE = Path(__file__).parent / "golden" / "prompt_to_prompt.npz"
TOKENIZER = tokenizer()


# Words


def tokens(caption: str) -> list[int]:
    return TOKENIZER(caption, truncation=True, max_length=TOKENS).input_ids


def spans(caption: str) -> list[list[int]]:
    """The token places of each word, by the characters that the tokens stand for."""
    offsets = TOKENIZER(
        caption, truncation=True, max_length=TOKENS, return_offsets_mapping=True
    ).offset_mapping
    inner = list(enumerate(offsets))[1:-1]
    words = [m.span() for m in re.finditer(r"\S+", caption)]
    return [[i for i, (a, b) in inner if start <= a and b <= end] for start, end in words]


def places(caption: str, word: str) -> list[int]:
    found = zip(caption.split(), spans(caption), strict=True)
    return [i for other, span in found if other == word for i in span]


def padding(first: str, second: str) -> list[tuple[int, int]]:
    """End and padding of the second caption with those of the first."""
    a, b = len(tokens(first)), len(tokens(second))
    return [(a - 1, b - 1)] + [(min(max(a, j), TOKENS - 1), j) for j in range(b, TOKENS)]


def swap_mapper(first: str, second: str) -> np.ndarray:
    """Maps of words are moved; to another number of tokens, shared out evenly."""
    mapper = np.zeros((TOKENS, TOKENS))
    mapper[0, 0] = 1
    for x, y in zip(spans(first), spans(second), strict=True):
        for n, i in enumerate(x):
            for m, j in enumerate(y):
                mapper[i, j] = float(n == m) if len(x) == len(y) else 1 / len(y)
    for i, j in padding(first, second):
        mapper[i, j] = 1
    return mapper


def refined(first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Column j of the mapper picks the first caption's token that is the second's token j."""
    x, y = tokens(first), tokens(second)

    @functools.cache
    def best(i: int, j: int) -> int:
        """Score of the best alignment of the first i and j elements; gaps cost nothing."""
        if i == 0 or j == 0:
            return 0
        return max(
            best(i, j - 1), best(i - 1, j), best(i - 1, j - 1) + (1 if x[i - 1] == y[j - 1] else -1)
        )

    pairs = padding(first, second)
    i, j = len(x), len(y)
    while i > 0 and j > 0:
        if best(i, j) == best(i, j - 1):
            j -= 1
        elif best(i, j) == best(i - 1, j):
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    mapper = np.zeros((TOKENS, TOKENS))
    mapper[tuple(np.array(pairs).T)] = 1
    return mapper, mapper.sum(0)


def windows(case: Case) -> np.ndarray:
    """alpha: 1 where token j is taken over in step i."""
    alpha = np.zeros((STEPS, TOKENS))
    for i in range(STEPS):
        alpha[i] = case.default[0] <= i / STEPS < case.default[1]
        for word, (start, end) in case.words.items():
            alpha[i, places(case.second, word)] = start <= i / STEPS < end
    return alpha


def equalizer(case: Case) -> np.ndarray:
    scale = np.ones(TOKENS)
    for word, value in case.scales.items():
        scale[places(case.second, word)] = value
    return scale


# Maps, in rows of the paper's code: both unconditional, then both conditional


class Control:
    """Holds a case's settings, the step, and the sum of the maps so far."""

    def __init__(self, case: Case):
        if case.swap:
            mapper, aligned = swap_mapper(case.first, case.second), np.ones(TOKENS)
        else:
            mapper, aligned = refined(case.first, case.second)
        arrays = mapper, aligned, windows(case), equalizer(case)
        self.mapper, self.aligned, self.alpha, self.scale = (
            torch.tensor(x, dtype=torch.float32) for x in arrays
        )
        self.case, self.step = case, 0
        self.total = torch.zeros(2, MAPS, MAPS, TOKENS)

    def cross(self, maps: torch.Tensor) -> torch.Tensor:
        """Edit(M, M*, t) of section 3.2 for "row k n m"; records M and M* before."""
        if maps.shape[2] == MAPS**2:
            self.total += maps[2:].mean(1).reshape(2, MAPS, MAPS, TOKENS)
        first, second = maps[2], maps[3]
        taken = self.aligned * (first @ self.mapper) + (1 - self.aligned) * second
        alpha = self.alpha[self.step]
        edited = alpha * taken + (1 - alpha) * second
        return torch.stack([maps[0], maps[1], first, self.scale * edited])

    def self_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Copies scores before the softmax, both halves (authors) or the conditional (paper)."""
        scores = scores.clone()
        if self.step / (STEPS - 1) < self.case.p:
            scores[1], scores[3] = scores[0], scores[2]
        start, end = self.case.inject
        if start <= self.step / STEPS < end and scores.shape[2] <= MOST:
            scores[3] = scores[2]
        return scores

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        """diffusers' attention processor."""
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            y.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if cross:
            maps = self.cross(scores.softmax(-1))
        else:
            maps = self.self_scores(scores).softmax(-1)
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))

    def blend(self, z: torch.Tensor) -> torch.Tensor:
        """Algorithm 1's local editing."""
        if self.case.blend is None:
            return z
        mask = torch.zeros(2, TOKENS)
        for row, (caption, words) in enumerate(
            zip((self.case.first, self.case.second), self.case.blend, strict=True)
        ):
            for word in words:
                mask[row, places(caption, word)] = 1
        return local_blend(z, self.total, mask, self.case.threshold)


def local_blend(z, total, words, threshold: float):
    """z* becomes (1 - alpha) z + alpha z*, alpha = B(M_w) or B(M*_w*); z is "2 c h w"."""
    maps = (total * words[:, None, None, :]).sum(-1)
    maps = F.interpolate(F.max_pool2d(maps[:, None], 3, 1, 1), size=z.shape[2:])
    maps = maps / maps.amax((2, 3), keepdim=True)
    assert (maps - threshold).abs().min() > 1e-4, "too near the threshold to be compared"
    alpha = (maps > threshold).any(0).float()
    assert 0.02 < alpha.mean() < 0.98, "the mask is empty or full"
    return torch.stack([z[0], (1 - alpha) * z[0] + alpha * z[1]])


# A whole generation, Euler's method in sigma space


def sigmas() -> np.ndarray:
    """k-diffusion's grid."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - beta)
    table = np.log(((1 - alpha_bar) / alpha_bar) ** 0.5)
    return np.append(np.exp(np.interp(np.linspace(999, 0, STEPS), np.arange(1000), table)), 0)


@torch.no_grad()
def generate(unet: UNet2DConditionModel, name: str, case: Case) -> np.ndarray:
    """Final latents "2 h w c"."""
    control = Control(case)
    unet.set_attn_processor(control)
    null = np.stack([states("null")[0]] * 2)
    text = torch.from_numpy(np.concatenate([null, states(name)]))
    levels, t = sigmas(), np.linspace(999, 0, STEPS)
    z = torch.from_numpy(np.stack([noise()] * 2)).permute(0, 3, 1, 2) * levels[0]
    for i in range(STEPS):
        control.step = i
        x = torch.cat([z, z]) / (levels[i] ** 2 + 1) ** 0.5
        none, given = unet(x.float(), torch.tensor(t[i]).float(), text).sample.chunk(2)
        eps = none + GUIDANCE * (given - none)
        z = control.blend((z + eps * (levels[i + 1] - levels[i])).float())
    return z.permute(0, 2, 3, 1).numpy()


def main() -> None:
    unet = randomize(UNet2DConditionModel(**{**TINY_UNET, "in_channels": 4}), 0)
    arrays = {f"latents/{name}": generate(unet, name, case) for name, case in CASES.items()}
    for name, case in CASES.items():
        arrays[f"windows/{name}"] = windows(case).astype(bool)
        arrays[f"equalizer/{name}"] = equalizer(case).astype(np.float32)
    for name, captions in CAPTIONS.items():
        arrays[f"swap/{name}"] = swap_mapper(*captions).astype(np.float32)
    for name, captions in {**CAPTIONS, **ADDED}.items():
        mapper, aligned = refined(*captions)
        arrays[f"mapper/{name}"] = mapper.astype(np.float32)
        arrays[f"aligned/{name}"] = aligned.astype(np.float32)
    z, maps, words, thresholds = (torch.from_numpy(x) for x in blended())
    pairs = [
        local_blend(z[i : i + 2].permute(0, 3, 1, 2), maps[i : i + 2], words[i : i + 2], threshold)
        for i, threshold in zip((0, 2), thresholds, strict=True)
    ]
    arrays["blend"] = torch.cat(pairs).permute(0, 2, 3, 1).numpy()
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
