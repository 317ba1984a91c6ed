# SPDX-License-Identifier: Apache-2.0
"""What the server of openai_server.py answers, and what goes wrong, as functions of the seed."""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiohttp import web

KEY = "key-of-the-tests"
FLAGGED = "gruesome"
TRANSPORT = ("rate_limit", "server_error", "timeout", "reset", "half", "lost")
WRONG = ("malformed", "schema", "cut", "same", "unsafe", "refusal")


@dataclass(frozen=True)
class Faults:
    """What goes wrong: shares in [0, 1], times in seconds, counts."""

    seed: int = 0
    latency: float = 0.0  # before every chat answer
    rate_limit: float = 0.0  # 429 with Retry-After
    retry_after: float = 0.05
    per_second: float = 0.0  # chats a second before 429 (0: no limit)
    server_error: float = 0.0  # 500
    timeout: float = 0.0  # no answer for `hold` seconds, then the connection closes
    hold: float = 30.0
    reset: float = 0.0  # the connection is reset before any work
    half: float = 0.0  # the body breaks off in its middle
    lost: float = 0.0  # all is done, then the connection is reset
    streak: int = 3
    malformed: float = 0.0  # not JSON
    schema: float = 0.0  # JSON that breaks the schema
    cut: float = 0.0  # finish_reason "length"
    same: float = 0.0  # the output is the caption, but for case and a full stop
    unsafe: float = 0.0  # the output holds FLAGGED
    refusal: float = 0.0  # a refusal instead of content
    polls: int = 1
    batch_fail: float = 0.0
    batch_expire: float = 0.0
    batch_error: float = 0.0
    batch_requests: int = 50_000  # limits of a batch's input file
    batch_bytes: int = 200_000_000
    batch_queue: int = 10**9  # requests in batches that have not ended: above, a batch fails
    job_fail: bool = False


class Answered(NamedTuple):
    """A line of the log. An answer that is sent again (Idempotency-Key) is a line with its id."""

    id: str
    via: str  # "chat" or the id of a batch
    custom_id: str | None
    caption: str
    number: int  # of the answers for this caption, from 0
    kind: str  # "good" or a name of WRONG
    content: str
    sent: bool  # False: lost on the way


def draw(*parts: Any) -> float:
    """A number in [0, 1) that the parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def chosen(faults: Faults, names: tuple[str, ...], *parts: Any) -> str | None:
    """The fault that is drawn, or None."""
    left = draw(faults.seed, *parts)
    for name in names:
        left -= getattr(faults, name)
        if left < 0:
            return name
    return None


EDITS = (
    ("make it winter", "{} in deep snow"),
    ("as a watercolor", "a watercolor of {}"),
    ("add a hot-air balloon", "{} with a hot-air balloon"),
    ("turn the light to dusk", "{} at dusk"),
    ("put it on the moon", "{} on the moon"),
    ("have it made of glass", "{} made of glass"),
)


def answer(caption: str, number: int, faults: Faults) -> tuple[str, str]:
    """(kind, content) of the number-th answer for a caption."""
    edit, output = EDITS[int(draw(faults.seed, "edit", caption, number) * len(EDITS))]
    said = {"edit": edit, "output": output.format(caption.rstrip(".!?"))}
    match kind := chosen(faults, WRONG, "answer", caption, number) or "good":
        case "malformed":
            return kind, f"Sure! Here it is: {json.dumps(said)[:-2]}"
        case "schema":
            broken = ({"edit": edit}, {"edit": 7, "output": None}, [edit], {"answer": said})
            return kind, json.dumps(broken[int(draw(caption, number) * len(broken))])
        case "cut":
            return kind, json.dumps(said)[: len(edit) + 15]
        case "same":
            said["output"] = caption.rstrip(".!? ").upper() + "."
        case "unsafe":
            said["output"] += f", {FLAGGED}"
        case "refusal":
            return kind, ""
    return kind, json.dumps(said, ensure_ascii=False)


def completion(id: str, model: str, kind: str, content: str) -> dict[str, Any]:
    """The body of a chat answer."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if kind == "refusal":
        message |= {"content": None, "refusal": "I'm sorry, I can't help with that."}
    finish = "length" if kind == "cut" else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    used = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70}
    body = {"id": id, "object": "chat.completion", "created": now(), "model": model}
    return body | {"choices": [choice], "usage": used}


def now() -> int:
    return int(time.time())


def caption_of(body: dict[str, Any]) -> str:
    """The text of the last user message; ValueError says what is wrong with a request."""
    for field in ("model", "messages"):
        if not body.get(field):
            raise ValueError(f"Missing required parameter: '{field}'.")
    said = [message["content"] for message in body["messages"] if message["role"] == "user"]
    if not said or not isinstance(said[-1], str):
        raise ValueError("Invalid 'messages': expected a user message of text.")
    form = body.get("response_format", {"type": "text"})
    if form["type"] == "json_schema":
        required = set(form["json_schema"]["schema"]["required"])
        if required != {"edit", "output"}:
            raise ValueError(f"Invalid schema: this server knows edit and output, not {required}.")
    return said[-1]


def refused(status: int, message: str, code: str = "invalid_request", **headers: str):
    """An error as the API words it."""
    error = {"message": message, "type": code, "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)
