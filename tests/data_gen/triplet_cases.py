# SPDX-License-Identifier: Apache-2.0
"""Captions, and what a run has to make of what the server of the tests has answered.

The server knows which of its answers are good; what is expected here follows from that alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.openai_server import FLAGGED, Server

ATTEMPTS = 4

ANSWERS = dict.fromkeys(("malformed", "schema", "cut", "same", "unsafe", "refusal"), 0.06)
"""A third of the answers are wrong, so that one caption in a hundred gets no triplet."""

TRANSPORT = {"rate_limit": 0.02, "server_error": 0.04, "reset": 0.04, "half": 0.04, "lost": 0.04}
"""A fifth of the requests fail."""

PLACES = ("by the sea", "in a forest", "on a street", "under a bridge", "at the market")


def captions(count: int) -> list[str]:
    """Different captions, of which every 50th must not be asked about."""
    things = [f"thing {i * 7919:08d} {PLACES[i % len(PLACES)]}" for i in range(count)]
    return [f"{x}, {FLAGGED}" if i % 50 == 49 else x for i, x in enumerate(things)]


def write_captions(path: Path, texts: Sequence[str]) -> Path:
    """Writes captions, every other one with a url."""
    lines = [
        {"caption": text} | ({"url": f"http://x/{text[6:14]}.jpg"} if i % 2 else {})
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def options(captions: Path, output: Path, server: Server) -> list[str]:
    """A command line without near-duplicates, for captions that are alike."""
    named = {"--captions": captions, "--output": output, "--model": "tiny-chat"}
    named |= {"--base-url": server.url, "--backoff": 0.02, "--timeout": 2, "--near-duplicates": 1}
    return [str(x) for pair in named.items() for x in pair]


def expected(server: Server, texts: Sequence[str]) -> list[dict[str, str]]:
    """The first good answer of each caption, in the order of the captions."""
    found, paid = [], server.paid()
    for i, text in enumerate(texts):
        good = [said for said in paid.get(text, ()) if said.kind == "good"]
        if good:
            said = json.loads(good[0].content)
            url = {"url": f"http://x/{text[6:14]}.jpg"} if i % 2 else {}
            found.append({"caption" if url else "input": text, **said, **url})
    return found


def check(output: Path, server: Server, texts: Sequence[str]) -> None:
    """None lost, none twice, none asked (or paid) for more often than needed."""
    rows = [json.loads(line) for line in (output / "triplets.jsonl").read_text().splitlines()]
    assert rows == expected(server, texts)
    paid = server.paid()
    assert len({said.id for said in server.log()}) == sum(map(len, paid.values()))
    assert set(paid) == {text for text in texts if FLAGGED not in text}
    for answers in paid.values():
        kinds = [said.kind for said in sorted(answers, key=lambda said: said.number)]
        assert "good" not in kinds[:-1]
        assert kinds[-1] == "good" or len(kinds) == ATTEMPTS


def lines(output: Path) -> list[dict]:
    """What the file of answers holds."""
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
