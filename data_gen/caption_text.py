# SPDX-License-Identifier: Apache-2.0
"""Cleans captions as the web has them, in any language, and says why one is of no use."""

import html
import re
import unicodedata
from typing import NamedTuple

TAG = re.compile(r"<(?:/?[a-zA-Z][^<>]*|!--.*?--|![a-zA-Z][^<>]*)>", re.DOTALL)
URL = re.compile(
    r"(?:\b[a-z][a-z0-9+.-]*://|\bwww\.)(?:[^\s<>()\[\]{}\"']|\([^\s()]*\))+", re.IGNORECASE
)
BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ufeff\ufffc\ufffd]+")
LEFT_BY_URL = re.compile(r"[\[({]\s*[\])}]|\s[:|\u2013\u2014-]+\s*$|^\s*[:|\u2013\u2014-]+\s")


class Bounds(NamedTuple):
    """Which captions are of use: the least and greatest length in characters, the least number of
    letters (of any script) among them."""

    shortest: int = 3
    longest: int = 300
    letters: int = 2


def clean(text: str) -> str:
    """A caption without tags, URLs, control characters and blanks that say nothing.

    HTML's entities become what they stand for, also those that were written twice (`&amp;amp;`);
    what is composed of several characters becomes one where there is one (NFC).
    """
    if "&" in text:
        for _ in range(3):
            unescaped = html.unescape(text)
            if unescaped == text:
                break
            text = unescaped
    if "<" in text:
        text = TAG.sub(" ", text)
    if "://" in text or "www." in text.lower():
        text = LEFT_BY_URL.sub(" ", URL.sub("", text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).encode(errors="ignore").decode()
    return BLANK.sub(" ", text).strip()


def useless(caption: str, bounds: Bounds) -> str:
    """Why a cleaned caption is of no use, or ""."""
    if not caption:
        return "empty"
    if len(caption) < bounds.shortest:
        return "too short"
    if len(caption) > bounds.longest:
        return "too long"
    if sum(map(str.isalpha, caption)) < bounds.letters:
        return "no words"
    return ""


def folded(caption: str) -> str:
    """What captions that say the same have in common: without case, width of letters, full stop."""
    return unicodedata.normalize("NFKC", caption).casefold().rstrip(" .!?\u3002\uff01\uff1f")
