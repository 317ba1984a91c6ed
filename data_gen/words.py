# SPDX-License-Identifier: Apache-2.0
"""From words of captions to arrays over CLIP's tokens, for `data_gen.prompt_to_prompt`; numpy only.

Words are what stands between white space. A caption has a start token, the tokens of its words, an
end token and padding up to the tokenizer's limit (77); what is longer is cut.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from transformers import CLIPTokenizer

Window = tuple[float, float]
"""Shares of all steps: step i of n is inside where start <= i / n < end."""


class Alignment(NamedTuple):
    """Where the maps of the second caption's tokens come from.

    mapper[i, j]: how much of the map of the first caption's token i token j of the second takes.
    aligned[j]: 1, or 0 for a token that has nothing in the first caption and keeps its own map.
    """

    mapper: Float[np.ndarray, "n n"]
    aligned: Float[np.ndarray, " n"]


def tokens_within(caption: str, start: int, end: int, tokenizer: CLIPTokenizer) -> list[int]:
    """The places of the tokens that stand for characters `start` to `end` of the caption."""
    limit = tokenizer.model_max_length
    encoding = tokenizer(caption, truncation=True, max_length=limit, return_offsets_mapping=True)
    spans = enumerate(encoding.offset_mapping)  # start and end token stand for nothing
    return [place for place, (a, b) in spans if start <= a < b <= end]


def word_tokens(caption: str, tokenizer: CLIPTokenizer) -> list[list[int]]:
    """The places of each word's tokens; the start token is at place 0."""
    words = re.finditer(r"\S+", caption)
    return [tokens_within(caption, *word.span(), tokenizer) for word in words]


def tokens_of(caption: str, word: str, tokenizer: CLIPTokenizer) -> list[int]:
    """The places of a word's tokens, of all its occurrences, in any case.

    Punctuation around it is not part of it. Raises ValueError if the caption lacks it.
    """
    same = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    found = [tokens_within(caption, *m.span(), tokenizer) for m in same.finditer(caption)]
    if not any(found):
        raise ValueError(f"the word {word!r} is not in the caption {caption!r}")
    return sum(found, [])


def word_mask(
    caption: str, words: Sequence[str], tokenizer: CLIPTokenizer
) -> Float[np.ndarray, " n"]:
    """1 at the tokens of `words`, else 0: what `local_blend` looks at."""
    mask = np.zeros(tokenizer.model_max_length, np.float32)
    for word in words:
        mask[tokens_of(caption, word, tokenizer)] = 1
    return mask


def equalizer(
    caption: str, scales: Mapping[str, float], tokenizer: CLIPTokenizer
) -> Float[np.ndarray, " n"]:
    """The scale of each token's map for `reweight`: a word's own, else 1."""
    scale = np.ones(tokenizer.model_max_length, np.float32)
    for word, value in scales.items():
        scale[tokens_of(caption, word, tokenizer)] = value
    return scale


def windows(
    caption: str,
    steps: int,
    tokenizer: CLIPTokenizer,
    default: Window = (0.0, 1.0),
    words: Mapping[str, Window] | None = None,
) -> Bool[np.ndarray, "steps n"]:
    """In which steps each token of the second caption takes its map from the first.

    A word has its own window or the default one, which the end token and padding have, too.
    """
    fraction = np.arange(steps) / steps
    bounds = np.tile(np.array(default), (tokenizer.model_max_length, 1))
    for word, window in (words or {}).items():
        bounds[tokens_of(caption, word, tokenizer)] = window
    start, end = bounds.T
    return (start[None] <= fraction[:, None]) & (fraction[:, None] < end[None])


def replacement(first: str, second: str, tokenizer: CLIPTokenizer) -> Alignment:
    """Word swap: each word takes the maps of the word at its place in the first caption.

    Token by token if both words have equally many; else each of m tokens takes 1/m of the sum of
    the other word's maps, so that no attention of a word is lost. Raises ValueError unless the
    captions have equally many words.
    """
    swaps = [word_tokens(caption, tokenizer) for caption in (first, second)]
    counts = [len(words) for words in swaps]
    if counts[0] != counts[1]:
        raise ValueError(
            f"a word swap needs captions of equally many words: {counts[0]} in {first!r}, "
            f"{counts[1]} in {second!r}"
        )
    n = tokenizer.model_max_length
    mapper = np.zeros((n, n), np.float32)
    for x, y in zip(*swaps, strict=True):
        if len(x) == len(y):
            mapper[x, y] = 1
        elif y:
            mapper[np.ix_(x, y)] = 1 / len(y)
    ends = [len(encoded(caption, tokenizer)) - 1 for caption in (first, second)]
    return with_special_tokens(mapper, *ends)


def refinement(first: str, second: str, tokenizer: CLIPTokenizer) -> Alignment:
    """Added words: tokens that both captions have, in the same order, share their maps."""
    x, y = (encoded(caption, tokenizer) for caption in (first, second))
    n = tokenizer.model_max_length
    mapper = np.zeros((n, n), np.float32)
    for j, i in enumerate(align(x, y)):
        if i is not None:
            mapper[i, j] = 1
    return with_special_tokens(mapper, len(x) - 1, len(y) - 1)


def encoded(caption: str, tokenizer: CLIPTokenizer) -> list[int]:
    """The tokens of a caption from start to end token, cut to the tokenizer's limit."""
    limit = tokenizer.model_max_length
    return tokenizer(caption, truncation=True, max_length=limit).input_ids


def align(x: Sequence[int], y: Sequence[int]) -> list[int | None]:
    """For every element of y its place in x, or None, by the best global alignment.

    Needleman and Wunsch 1970 with match 1, mismatch -1, gap 0, as the paper's code: the longest
    common subsequence. Of equally good alignments that which pairs the earliest elements of y.
    """
    best = np.zeros((len(x) + 1, len(y) + 1), int)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            paired = best[i, j] + (1 if a == b else -1)
            best[i + 1, j + 1] = max(best[i + 1, j], best[i, j + 1], paired)
    places: list[int | None] = [None] * len(y)
    i, j = len(x), len(y)
    while i and j:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            places[j] = i
    return places


def with_special_tokens(
    mapper: Float[np.ndarray, "n n"], end_first: int, end_second: int
) -> Alignment:
    """Completes the mapper of words: start to start token, end to end, padding to padding.

    That is the padding at the same place, or the first where the first caption has a word there.
    """
    last = len(mapper) - 1
    mapper[0, 0] = mapper[end_first, end_second] = 1
    for j in range(end_second + 1, last + 1):
        mapper[min(max(j, end_first + 1), last), j] = 1
    return Alignment(mapper, np.asarray(mapper.any(axis=0), np.float32))
