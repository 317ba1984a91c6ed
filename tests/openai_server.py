# SPDX-License-Identifier: Apache-2.0
"""A server on 127.0.0.1 that speaks the OpenAI API, with faults turned on by arguments.

    with serve(tmp_path, rate_limit=0.1, malformed=0.05, seed=3) as server:
        run("--base-url", server.url, env=server.environment())
        server.log()     every chat answer the server made, in order, as `Answered`
        server.paid()    what was made and reached the wire, each once: {caption: [Answered, ...]}
        server.stats()   {"requests": {path: n}, "faults": {name: n}, "peak": chats at once, ...}
        server.change(rate_limit=0.0)

It runs in a process of its own (`python -m tests.openai_server --help`), so that a client can be
killed and starts again against the same server. Spoken, below `server.url` (.../v1):

    POST chat/completions          response_format of json_schema is obeyed; n = 1, no streaming
    POST moderations               a text is flagged if it holds the word FLAGGED
    POST GET files, GET DELETE files/ID, GET files/ID/content
    POST GET fine_tuning/jobs, GET fine_tuning/jobs/ID and .../events, POST .../cancel
    POST GET batches, GET batches/ID, POST batches/ID/cancel
    GET  models

Caption = the text of the last user message. Everything depends on the seed, the caption and the
number of the answer (or of the request) for that caption alone, never on order or time:
`answer(caption, number, faults)` is what the server says the number-th time. A transport fault
(rate_limit server_error timeout reset half lost) is drawn for every request, at most `streak` in
a row for the same caption or path; `half` and `lost` make the answer and lose it on the way, the
others make none. A fault of the answer (malformed schema cut same unsafe refusal) is made, sent
and paid. A request with the header Idempotency-Key that was answered before gets that answer
again, with its id, and nothing new is paid. Without the right key: 401.

Batches and jobs move on one state a GET (`polls` GETs in each working state). The answers of a
batch are made when it ends: `batch_fail` and `batch_expire` are shares of batches, drawn by the
number of the batch; an expired (or cancelled) one has answered one half, the others are in its
error file as `batch_expired`, unpaid. `batch_error` is the share of lines that end as 500 in the
error file, unpaid. Output lines are shuffled.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.openai_answers import FLAGGED, KEY, Answered, Faults, answer
from tests.openai_api import Api

__all__ = ["FLAGGED", "KEY", "Answered", "Faults", "Server", "answer", "serve"]


@dataclass(frozen=True)
class Server:
    """A running server, as a test sees it."""

    root: str
    file: Path
    faults: Faults

    @property
    def url(self) -> str:
        """For --base-url."""
        return f"{self.root}/v1"

    def environment(self) -> dict[str, str]:
        """This process's environment with the server's key."""
        return os.environ | {"OPENAI_API_KEY": KEY}

    def log(self) -> list[Answered]:
        """Every answer made so far, and every one sent again."""
        return [Answered(**json.loads(line)) for line in self.file.read_text("utf-8").splitlines()]

    def paid(self) -> dict[str, list[Answered]]:
        """By caption, the answers that were sent, each once, in the order in which they were."""
        sent = {said.id: said for said in self.log() if said.sent}
        paid: dict[str, list[Answered]] = {}
        for said in sent.values():
            paid.setdefault(said.caption, []).append(said)
        return paid

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/stats", timeout=30) as reply:
            return json.load(reply)

    def change(self, **faults: Any) -> None:
        """Other faults from now on."""
        body = json.dumps(faults).encode()
        urllib.request.urlopen(f"{self.root}/faults", data=body, timeout=30).close()


@contextlib.contextmanager
def serve(folder: Path, **faults: Any) -> Iterator[Server]:
    """Runs a server; its log is a file in `folder`."""
    asked, log = Faults(**faults), folder / f"server-{os.getpid()}-{time.monotonic_ns()}.jsonl"
    command = [
        sys.executable,
        "-m",
        "tests.openai_server",
        "--log",
        str(log.absolute()),
        "--faults",
        json.dumps(asdict(asked)),
    ]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            yield Server(f"http://127.0.0.1:{port}", log, asked)
        finally:
            process.kill()


async def run(port: int, faults: Faults, log: Path) -> None:
    """Serves until killed; prints the port."""
    runner = web.AppRunner(Api(faults, log).app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--faults", type=json.loads, default={}, help="JSON of Faults")
    options = parser.parse_args()
    asyncio.run(run(options.port, Faults(**options.faults), options.log))
