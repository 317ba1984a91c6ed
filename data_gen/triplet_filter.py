# SPDX-License-Identifier: Apache-2.0
"""Which answers become triplets: form, length, and that anything changes at all (section 3.1.1)."""

from typing import NamedTuple

from data_gen.prompt import AnswerError, read_answer

ATTEMPTS = 4
"""How often a caption is asked until an answer is accepted; the authors' number."""


class Limits(NamedTuple):
    """The least and the greatest length in characters, so that it means something in any script."""

    edit: tuple[int, int] = (2, 200)
    output: tuple[int, int] = (2, 500)


class Judgement(NamedTuple):
    """The texts of an answer, as far as they could be read, and why it is rejected, or ""."""

    edit: str
    output: str
    reason: str


def judge(caption: str, answer: str, finish: str, limits: Limits) -> Judgement:
    """Judges an answer by everything but moderation.

    finish: the server's finish_reason; "length" means that the answer was cut off.
    reason: "cut", "filtered" (by the server), "not_json", "not_schema", "edit_length",
    "output_length", "unchanged", or "" if nothing is wrong.
    """
    if finish in ("length", "content_filter"):
        return Judgement("", "", "cut" if finish == "length" else "filtered")
    try:
        edit, output = read_answer(answer)
    except AnswerError as error:
        return Judgement("", "", str(error))
    return Judgement(edit, output, fault(caption, edit, output, limits))


def fault(caption: str, edit: str, output: str, limits: Limits) -> str:
    """What is wrong with the texts of a triplet, or ""."""
    if plain(caption) == plain(output):
        return "unchanged"
    for name, text in (("edit", edit), ("output", output)):
        least, most = getattr(limits, name)
        if not least <= len(text) <= most:
            return f"{name}_length"
    return ""


def plain(caption: str) -> str:
    """A caption without white space and .!? around it, in lower case, as the authors compare."""
    return caption.strip().strip(".!?").lower()
