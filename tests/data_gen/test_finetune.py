# SPDX-License-Identifier: Apache-2.0
"""Claims: hand-written triplets become chat lines and the old format, or are refused by name; a
job is started once and followed to its end, whatever the server does and whenever the command is
killed; keys are in no file and no message.

The server is a real one on 127.0.0.1: see tests/openai_server.py.
"""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from data_gen import fine_tuning_job, prompt
from data_gen.fine_tuning_job import Job, Order
from data_gen.finetune import main, tokens
from data_gen.pace import ServerError
from data_gen.server import Server
from data_gen.triplet_file import read_triplet, read_triplets, to_line
from ip2p_jax.cli import alone
from ip2p_jax.weights.hub import ASSETS
from tests.kills import KILLS, write_row
from tests.openai_server import KEY, serve

EXAMPLES = Path(prompt.__file__).with_name("examples.jsonl")
TRIPLETS = read_triplets(EXAMPLES)
TRANSPORT = {"rate_limit": 0.1, "server_error": 0.1, "reset": 0.1, "half": 0.1, "lost": 0.2}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on the examples, with the server's key, and without long waits."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(fine_tuning_job, "FIRST", 0.01)

    def command(*options, triplets=EXAMPLES):
        given = [f"--triplets={triplets}", f"--output={tmp_path / 'out'}", "--poll=0.01"]
        return main([*given, *options])

    return command


def submit(server):
    return ["--submit", "--model=tiny-chat", f"--base-url={server.url}"]


def record(folder):
    return json.loads((folder / "out" / "job.json").read_text())


def test_files(run, tmp_path, capsys):
    """A chat line is the conversation that is asked later, answered; the old format is the old."""
    assert run("--price=25", "--epochs=3") == 0
    paid = 3 * sum(map(tokens, TRIPLETS))
    cost = f"{paid:,} tokens, {paid * 25e-6:.2f} USD at 25 USD a million"
    assert capsys.readouterr().out == f"60 triplets, 3 epochs: about {cost}\n"
    out = tmp_path / "out"
    assert sorted(x.name for x in out.iterdir()) == ["chat.jsonl", "completions.jsonl"]
    lines = (out / "chat.jsonl").read_text("utf-8").splitlines()
    for line, triplet in zip(lines, TRIPLETS, strict=True):
        *asked, answered = json.loads(line)["messages"]
        assert asked == prompt.messages(triplet.input)
        assert answered["role"] == "assistant"
        assert prompt.read_answer(answered["content"]) == (triplet.edit, triplet.output)
    old = (out / "completions.jsonl").read_text("utf-8").splitlines()
    assert list(map(read_triplet, old)) == TRIPLETS
    assert json.loads(old[2]) == {
        "prompt": "Wooden cabin by a mountain lake in summer\n##\n",
        "completion": "make it winter\n%%\nWooden cabin by a frozen mountain lake in winter\nEND",
    }


def test_the_estimate_is_near_what_a_tokenizer_says():
    """CLIP's vocabulary of 49,408 is English: within a fifth of it for English examples."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer")
    texts = [x for x in TRIPLETS if x.edit.isascii()]
    counted = 0
    for triplet in texts:
        turns = [*prompt.messages(triplet.input), {"content": prompt.answer(triplet)}]
        counted += sum(
            len(tokenizer(x["content"], add_special_tokens=False)["input_ids"]) for x in turns
        )
    guessed = sum(map(tokens, texts)) - 12 * len(texts)  # but the form of the conversation
    assert abs(guessed / counted - 1) < 0.2


def test_wrong_triplets_are_all_named(run, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    lines = [*map(to_line, TRIPLETS[:3]), "{\n", to_line(TRIPLETS[0]), '{"input": "x"}\n']
    file.write_text("".join(lines), "utf-8")
    assert run(triplets=file) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said[:3]] == [f" {file}, line {i}" for i in (4, 5, 6)]
    assert said[3:] == ["error: 3 of 6 lines are wrong; nothing is written"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--submit"], "--model None: expected a name, to --submit"),
        (["--epochs=0"], "--epochs 0: expected 1 to 50"),
        (["--price=-1"], "--price -1.0: expected at least 0"),
        (["--triplets=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--validation=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--output=gs://bucket/x"], "--output gs://bucket/x: expected a local folder"),
        (["--base-url=http://x/v1?api_key=SECRET"], "--base-url: expected http(s)://host/path"),
        (["--submit", "--model=m"], "OPENAI_API_KEY is not set"),
    ],
)
def test_wrong_options(run, monkeypatch, capsys, options, message):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert "SECRET" not in error


def test_submitted(run, tmp_path, capsys):
    """The file is what was written, the model is what the server made; again, nothing is asked."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(to_line(TRIPLETS[0]._replace(input="something else entirely")))
    with serve(tmp_path, polls=2) as server:
        options = [*submit(server), "--epochs=2", f"--validation={held_out}"]
        assert run(*options) == 0
        out, err = capsys.readouterr()
        stats = server.stats()
        (job,) = stats["jobs"].values()
        assert out.splitlines()[-1] == f"model: {job['fine_tuned_model']}"
        assert job["hyperparameters"] == {"n_epochs": 2} and job["suffix"] == "ip2p"
        assert job["status"] == "succeeded" and "The job is running" in err
        assert record(tmp_path)["model"] == job["fine_tuned_model"]
        assert record(tmp_path)["trained_tokens"] == job["trained_tokens"]
        assert job["trained_tokens"] == 60 * len(TRIPLETS)  # so the server has read the file
        assert len(stats["files"]) == 2 and job["validation_file"] in stats["files"]
        assert run(*options) == 0
        assert capsys.readouterr().out == out
        assert server.stats()["requests"] == stats["requests"]


def test_a_server_that_fails_all_the_time(run, tmp_path, capsys):
    """Answers that are lost start no second job and leave no second file."""
    for seed in range(3):
        with serve(tmp_path, seed=seed, polls=2, **TRANSPORT) as server:
            assert run(*submit(server)) == 0
            stats = server.stats()
            assert sum(stats["faults"].values()) > 2
            assert (len(stats["jobs"]), len(stats["files"])) == (1, 1)
        shutil.rmtree(tmp_path / "out")
    capsys.readouterr()


def test_a_job_that_fails(run, tmp_path, capsys):
    """Is said to, also the next time; another is started when the record is removed."""
    with serve(tmp_path, job_fail=True) as server:
        for _ in range(2):
            assert run(*submit(server)) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            assert " failed: The job failed due to an internal error.; remove " in last
        assert len(server.stats()["jobs"]) == 1
        server.change(job_fail=False)
        (tmp_path / "out" / "job.json").unlink()
        assert run(*submit(server)) == 0
        assert (len(server.stats()["jobs"]), len(server.stats()["files"])) == (2, 1)


def test_servers_that_will_not(run, tmp_path, monkeypatch, capsys):
    """A wrong key is one line, without the key; a server that is away is asked again later."""
    with serve(tmp_path) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "secret-of-mine")
        assert run(*submit(server)) == 2
        error = capsys.readouterr().err
        assert "says 401" in error and "secret-of-mine" not in error
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        gone = submit(server)
    assert run(*gone) == 1
    assert "does not answer" in capsys.readouterr().err


REPLIES = {
    "GET files": {"data": [{"id": "other"}]},
    "POST files": {"id": "file"},
    "GET fine_tuning/jobs": {"data": [{"id": "other"}]},
    "POST fine_tuning/jobs": {"id": "job"},
    "GET fine_tuning/jobs/job": {"id": "job", "status": "succeeded", "fine_tuned_model": "ft"},
    "GET fine_tuning/jobs/job/events": {"data": [{"id": "1", "message": "done"}]},
}


@pytest.mark.parametrize("broken", [None, *REPLIES])
def test_answers_that_lack_what_they_must_hold(tmp_path, monkeypatch, broken):
    """Are faults of the server, not of the program; entries of a list may lack more."""
    monkeypatch.setattr(fine_tuning_job, "TRIES", 1)
    monkeypatch.setattr(fine_tuning_job, "FIRST", 0.01)
    (tmp_path / "chat.jsonl").write_text("{}\n")
    order = Order(tmp_path / "chat.jsonl", None, "m", 1, "")

    async def answer(request: web.Request) -> web.Response:
        asked = f"{request.method} {request.match_info['path']}"
        return web.json_response({} if asked == broken else REPLIES[asked])

    async def followed():
        app = web.Application()
        app.router.add_route("*", "/v1/{path:.*}", answer)
        async with TestServer(app) as there:
            server = Server(str(there.make_url("/v1")), KEY, 5.0)
            return await Job(order, server, tmp_path / "job.json").run(0.01)

    if broken:
        with pytest.raises(ServerError, match="does not answer .an answer without '"):
            asyncio.run(followed())
    else:
        assert asyncio.run(followed())["model"] == "ft"


def test_another_job_in_the_same_folder_is_refused(run, tmp_path, capsys):
    with serve(tmp_path) as server:
        assert run(*submit(server)) == 0
        kept = (tmp_path / "out" / "chat.jsonl").read_bytes()
        fewer = tmp_path / "fewer.jsonl"
        fewer.write_text("".join(map(to_line, TRIPLETS[:20])), "utf-8")
        capsys.readouterr()
        for triplets, options in [(fewer, []), (EXAMPLES, ["--epochs=2"])]:
            assert run(*submit(server), *options, triplets=triplets) == 2
            assert "job.json: " in capsys.readouterr().err
        assert len(server.stats()["jobs"]) == 1
    assert (tmp_path / "out" / "chat.jsonl").read_bytes() == kept
    with alone(tmp_path / "out"):
        assert run() == 2
        assert "out: another process is writing there" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text("".join(map(to_line, TRIPLETS[:9])), "utf-8")
    shutil.rmtree(tmp_path / "out")
    assert run(*submit(server), triplets=few) == 2
    assert "9 to teach, expected 10 at least" in capsys.readouterr().err


RUN = """
import sys
from data_gen import fine_tuning_job, finetune
fine_tuning_job.FIRST = 0.01
sys.exit(finetune.main(sys.argv[1:]))
"""


def requests(server):
    return sum(server.stats()["requests"].values())


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL at random moments, with a server that loses answers: one file, one job, one model;
    the key is in no file. Whoever comes to the end begins anew, with another order."""
    draw, started, kills, order = random.Random(KILLS), 0, 0, 0
    with serve(tmp_path, polls=3, latency=0.02, **TRANSPORT) as server:
        given = [sys.executable, "-c", RUN, f"--triplets={EXAMPLES}", "--poll=0.02"]

        def command():
            named = [f"--output={tmp_path / f'out{order}'}", f"--suffix=order-{order}"]
            return [*given, *named, *submit(server)]

        quiet = {"env": server.environment(), "stderr": subprocess.DEVNULL}
        while kills < KILLS:
            begun = requests(server)
            with subprocess.Popen(command(), stdout=subprocess.DEVNULL, **quiet) as process:
                while process.poll() is None and requests(server) == begun:
                    time.sleep(0.02)
                time.sleep(0.15 * draw.random())
                process.kill()
            assert process.returncode in (0, -9) and started < 20 * KILLS
            started, kills = started + 1, kills + (process.returncode == -9)
            order += process.returncode == 0
        done = subprocess.run(command(), capture_output=True, text=True, env=server.environment())
        stats = server.stats()
    *_, job = jobs = list(stats["jobs"].values())
    assert done.returncode == 0 and done.stdout.endswith(f"model: {job['fine_tuned_model']}\n")
    assert len(stats["files"]) == len(jobs) == order + 1
    assert {job["status"] for job in jobs} == {"succeeded"}
    written = [x.read_text("utf-8") for x in tmp_path.glob("out*/*") if x.suffix != ".part"]
    assert KEY not in "".join([*written, done.stdout, done.stderr])
    write_row("a fine-tuning job", started, kills, 0)
