# SPDX-License-Identifier: Apache-2.0
"""What instructions ask for: their verb and its object, by a rule of thumb for English.

The verb is the first word; the object is the last word of the first phrase after it that stands
between small words: "turn the old car into a train" is (turn, car), "make it look like a painting
by Monet" is (make, painting). In other languages what is counted is words, not verbs.
"""

import re

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
POLITE = frozenset("please now also then just let's can could would you we".split())
SMALL = frozenset(
    "a an the this that these those some any all both each every one ones it its it's him his her "
    "hers them their there he she they i my me us our your is are was were be been being look "
    "looks looking seem like as if to into in on onto at of off from for with without by over "
    "under above below behind beside near next around through across between before after during "
    "instead and or but while so very more less much too up down out away back made".split()
)


def verb_and_object(instruction: str) -> tuple[str, str]:
    """In lower case; "" for what there is none of."""
    words = WORD.findall(instruction.lower())
    while words and words[0] in POLITE:
        del words[0]
    phrase: list[str] = []
    for word in words[1:]:
        if word not in SMALL:
            phrase.append(word)
        elif phrase:
            break
    return words[0] if words else "", phrase[-1] if phrase else ""
