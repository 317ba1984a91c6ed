# SPDX-License-Identifier: Apache-2.0
"""Claims: captions lose what the web put around them and nothing else, in any script; what is of
no use is left out for a named reason; captions that say the same are known as such."""

import pytest

from data_gen.caption_text import Bounds, clean, folded, useless


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("<b>A  cat</b><br/>asleep", "A cat asleep"),
        ("<!-- 12 -->A cat<!DOCTYPE html>", "A cat"),
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("Mr.&nbsp;Fox&#8217;s den", "Mr. Fox’s den"),
        ("a cat https://x.org/a_(b)?c=1&d asleep", "a cat asleep"),
        ("A cat (http://x.org/1.jpg) - www.cats.com", "A cat"),
        ("WWW.CATS.COM | A cat", "A cat"),
        ("a\x00 cat\u200b\ufeff\t\n asleep\x9f", "a cat\u200b asleep"),
        ("cafe\u0301 \ud83d", "café"),
        ("\ud83d\ude00 a cat", "a cat"),  # two halves that a program took apart
        ("👩\u200d🎨 paints a 猫", "👩\u200d🎨 paints a 猫"),
        ("क्षेत्र में एक किला", "क्षेत्र में एक किला"),
        ("قطة على حصيرة", "قطة على حصيرة"),
    ],
)
def test_cleaned(caption, cleaned):
    assert clean(caption) == cleaned
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize(
    "caption",
    ["a < b > c", "I <3 you", "AT&T, R&B", "wwwhat a cat", "Sunset - 1890", "e.g. a cat: asleep"],
)
def test_control_what_only_looks_like_html_or_urls_stays(caption):
    assert clean(caption) == caption


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        ("ab", "too short"),
        ("x" * 301, "too long"),
        ("12 / 34 (5)", "no words"),
        ("*****", "no words"),
        ("日の出", ""),
        ("cat", ""),
        ("x" * 300, ""),
    ],
)
def test_useless(caption, reason):
    assert useless(caption, Bounds()) == reason
    assert useless(caption, Bounds(0, 1000, 0)) == ("empty" if not caption else "")


def test_folded():
    assert folded("A Cat.") == folded("a cat") == folded("Ａ　ＣＡＴ！") == folded("a cat ...")
    assert len({folded(x) for x in ("a cat", "a cats", "a, cat", "猫", "犬", "café", "cafe")}) == 7
