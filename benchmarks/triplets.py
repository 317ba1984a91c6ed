# SPDX-License-Identifier: Apache-2.0
"""Times 64 requests at once to a server that answers after 200 ms, and weighs a million captions.

  python benchmarks/triplets.py [--runs 3] [--output benchmarks/triplets.md]

The server is that of the tests, a process of its own on the same machine, so both share its cores.
The rate is that of `data_gen.triplets`' own loop, every answer written down, without moderation,
with the transport that it uses and with the client's other one. For the memory, a run of a million
captions whose answers are there but for the last thousand goes on to its end: all are read, the
thousand asked for, near-duplicates among the million looked for, and everything written.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from processes import measure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

AT_ONCE, LATENCY = 64, 0.2
IDEAL = AT_ONCE / LATENCY
EXAMPLES = [json.loads(x) for x in (ROOT / "data_gen/examples.jsonl").read_text().splitlines()]
WORDS = sorted({word for example in EXAMPLES for word in example["input"].split()})


def captions(count: int) -> list[str]:
    """Different captions of twelve words."""
    draw = random.Random(0)
    return [f"{' '.join(draw.choices(WORDS, k=11))} {i}" for i in range(count)]


def write_captions(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"caption": x}) + "\n" for x in texts), "utf-8")


def rate(transport: str, url: str, count: str) -> dict:
    """Answers a second."""
    import openai

    from data_gen.asking import Asker, ask_all
    from data_gen.caption_index import CaptionIndex
    from data_gen.event_log import EventLog
    from data_gen.pace import Pace
    from data_gen.prompt import SAMPLING, Question
    from data_gen.server import server_at
    from data_gen.standing import OPEN, Standing
    from data_gen.triplet_filter import Limits

    async def ask(folder: Path) -> float:
        write_captions(folder / "captions.jsonl", captions(int(count)))
        index = CaptionIndex.open([folder / "captions.jsonl"])
        standing = Standing(index, Limits(), moderated=False, run=secrets.token_hex(8))
        server = server_at(url, "OPENAI_API_KEY", 60.0)
        if transport == "default":
            server.client = openai.AsyncOpenAI(base_url=url, max_retries=0)
        log = EventLog(folder / "answers.jsonl")
        question, pace = Question("tiny-chat", SAMPLING), Pace(AT_ONCE)
        asker = Asker(question, server, pace, None, log, standing, first=0.5)
        start = time.perf_counter()
        await ask_all(asker, index.read(standing.state == OPEN), AT_ONCE)
        seconds = time.perf_counter() - start
        assert (standing.accepted >= 0).all()
        await server.close()
        return seconds

    with tempfile.TemporaryDirectory() as folder:
        cpu = time.process_time()
        seconds = asyncio.run(ask(Path(folder)))
        cpu = (time.process_time() - cpu) / int(count)
    return {"answers/s": int(count) / seconds, "CPU ms": 1000 * cpu}


def memory(folder: str, url: str) -> dict:
    """Seconds that a run needs to its end."""
    from data_gen import triplets

    start = time.perf_counter()
    options = ["--captions", f"{folder}/captions.jsonl", "--output", f"{folder}/run"]
    options += ["--model", "tiny-chat", "--moderation", "off", "--base-url", url]
    assert triplets.main(options) == 0
    return {"seconds": time.perf_counter() - start}


def write_run(name: str, url: str, count: str, open_ones: str) -> dict:
    """A folder of captions, and a run in it that has answers but for the last ones."""
    from data_gen import triplets

    folder, texts = Path(name), captions(int(count))
    few = folder / "few.jsonl"
    write_captions(folder / "captions.jsonl", texts)
    write_captions(few, texts[:1])
    options = ["--captions", str(few), "--output", str(folder / "run"), "--model", "tiny-chat"]
    assert triplets.main([*options, "--moderation", "off", "--base-url", url]) == 0
    with (folder / "run" / "answers.jsonl").open("a") as file:
        for text, i in zip(texts[1 : int(count) - int(open_ones)], itertools.cycle(range(60))):
            edit = EXAMPLES[i]["edit"]
            said = json.dumps({"edit": edit, "output": f"{text}, {edit}"})
            line = {"caption": text, "attempt": 1, "answer": said, "finish": "stop"}
            file.write(json.dumps({**line, "tokens": [50, 20]}) + "\n")
    return {}


def line(name: str, runs: list[dict]) -> str:
    """A row of the table of rates."""
    rates = [run["answers/s"] for run in runs]
    middle, cpu = statistics.median(rates), statistics.median(run["CPU ms"] for run in runs)
    share = f"{middle / IDEAL:.0%}"
    return (
        f"| {name} | {middle:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {share} | {cpu:.2f} ms |"
    )


def report(args: argparse.Namespace) -> str:
    """Measures everything; Markdown."""
    from tests.openai_server import KEY, serve

    os.environ["OPENAI_API_KEY"] = KEY
    rates: dict[str, list[dict]] = {"aiohttp": [], "default": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder, latency=LATENCY) as server:
            for _ in range(args.runs):
                for transport, found in rates.items():
                    arguments = (transport, server.url, str(args.requests))
                    found.append(measure(__file__, "rate", *arguments, cache=name))
            arguments = (name, server.url, str(args.captions), "1000")
            measure(__file__, "write_run", *arguments, cache=name)
            whole = measure(__file__, "memory", name, server.url, cache=name)
    rows = [line("aiohttp, as `data_gen.triplets` uses it", rates["aiohttp"])]
    rows.append(line("httpx, the client's default", rates["default"]))
    parts = [
        f"{args.runs} processes of {args.requests} requests each, in turn, on {platform.machine()} "
        f"with {os.cpu_count()} cores, the server on the same; openai {version('openai')}, aiohttp "
        f"{version('aiohttp')}, Python {platform.python_version()}.\n",
        f"{AT_ONCE} requests at once to a server that answers after {LATENCY * 1000:.0f} ms: at "
        f"best {IDEAL:.0f} answers a second.\n",
        "| transport | answers a second | of the best | CPU time an answer |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n",
        f"A run of {args.captions:,} captions, the last 1,000 of them asked for, with near-"
        f"duplicates and report: peak memory {whole['peak GiB'] * 1024:.0f} MiB, "
        f"{whole['seconds']:.0f} s.\n",
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=6400)
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *arguments = args.worker
        # Processes of their own: what a process has ever used counts for those it starts.
        print(
            json.dumps({"rate": rate, "write_run": write_run, "memory": memory}[name](*arguments))
        )
        return
    text = report(args)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
