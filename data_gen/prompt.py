# SPDX-License-Identifier: Apache-2.0
"""What a language model is asked for an edit of a caption, and how its answer is read.

Fine-tuning teaches, and a fine-tuned model is asked, the conversation `messages(caption)`; a model
that is not fine-tuned is shown examples as earlier turns of the same conversation.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_gen.triplet_file import Triplet

SYSTEM = (
    "You write training examples for a program that edits pictures by instruction. The user gives "
    "the caption of a picture. Think of one edit of that picture: something added, removed or "
    "replaced, another style, medium, season, time of day, weather, place, material or mood. "
    'Answer with a JSON object. "edit" is the instruction in a few words, as a person would give '
    'it who sees the picture. "output" is the caption of the picture after the edit; what the edit '
    "does not change stays as it was. Write in the language of the caption."
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
    "required": ["edit", "output"],
    "additionalProperties": False,
}
"""The JSON schema of an answer."""

SAMPLING: dict[str, Any] = {
    "temperature": 0.7,
    "max_tokens": 256,
    "top_p": 1,
    "frequency_penalty": 0.1,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "edit", "strict": True, "schema": SCHEMA},
    },
}
"""The fields of a request beside model and messages; the numbers are the authors'."""


class AnswerError(ValueError):
    """An answer that is not what was asked for; its text is the reason in a word."""


def answer(triplet: Triplet) -> str:
    """The text of a right answer, in the form that `read_answer` reads."""
    return json.dumps({"edit": triplet.edit, "output": triplet.output}, ensure_ascii=False)


def messages(caption: str, examples: Sequence[Triplet] = ()) -> list[dict[str, str]]:
    """The conversation whose next turn is the answer; `examples` are shown in this order."""
    turns = [("system", SYSTEM)]
    for example in examples:
        turns += [("user", example.input), ("assistant", answer(example))]
    turns.append(("user", caption))
    return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True)
class Question:
    """What is asked: the model, the fields of a request beside messages, examples to show."""

    model: str
    fields: dict[str, Any]
    examples: Sequence[Triplet] = ()
    shown: int = 0

    def body(self, caption: str, attempt: int) -> dict[str, Any]:
        """The request; which examples it shows depends on the caption and the attempt alone."""
        draw = random.Random(f"{caption} {attempt}")
        shown = draw.sample(self.examples, self.shown)
        return {"model": self.model, "messages": messages(caption, shown), **self.fields}


def read_answer(content: str) -> tuple[str, str]:
    """Reads an answer: its instruction and edited caption, each of one line.

    Raises AnswerError: "not_json", or "not_schema" where SCHEMA is broken or a text is empty or
    holds half a character.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise AnswerError("not_json") from None
    if not isinstance(values, dict) or set(values) != {"edit", "output"}:
        raise AnswerError("not_schema")
    try:
        edit, output = (" ".join(values[name].split()) for name in ("edit", "output"))
        (edit + output).encode()
    except (AttributeError, UnicodeEncodeError):
        raise AnswerError("not_schema") from None
    if not edit or not output:
        raise AnswerError("not_schema")
    return edit, output
