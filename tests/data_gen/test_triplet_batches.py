# SPDX-License-Identifier: Apache-2.0
"""Claims: the Batch API gives the triplets that its good answers imply; batches that fail, expire
half-done or are too many are made again without what was answered; none is created twice; output
that is damaged is asked for again.
"""

import asyncio
import json

import pytest

from data_gen import batches, triplets
from data_gen.asking import REFUSALS
from data_gen.batches import read_output
from data_gen.server import Fault, Server
from data_gen.triplet_file import read_triplets
from tests.data_gen.test_triplets import killed_again_and_again
from tests.data_gen.triplet_cases import (
    ANSWERS,
    captions,
    check,
    expected,
    lines,
    options,
    write_captions,
)
from tests.kills import KILLS, write_row
from tests.openai_server import KEY, serve

TEXTS = captions(120)
EXPIRES = {"batch_expire": 0.3, "batch_fail": 0.1, "batch_error": 0.05}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def batch_options(file, output, server, size: int = 30) -> list[str]:
    more = ["--batch", "--batch-size", str(size), "--poll", "0.05"]
    return [*options(file, output, server), *more]


def in_batches(output) -> list[list[str]]:
    """The captions' keys of every batch that was made."""
    return [line["captions"] for line in lines(output) if "captions" in line]


def test_batches_that_fail_and_expire(tmp_path):
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS), tmp_path / "run"
    with serve(tmp_path, seed=14, **EXPIRES, **ANSWERS) as server:
        assert triplets.main(batch_options(file, output, server)) == 0
        check(output, server, TEXTS)
        made = server.stats()["batches"].values()
        assert {batch["status"] for batch in made} == {"completed", "expired", "failed"}
        assert len(made) == len(in_batches(output)) == sum("ended" in x for x in lines(output))
        assert max(map(len, in_batches(output))) == 30
        assert server.stats()["peak"] == 0, "nothing was asked otherwise"


def test_the_limit_of_bytes_splits_too(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BYTES", 20_000)
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:40]), tmp_path / "run"
    with serve(tmp_path, batch_bytes=20_000) as server:
        assert triplets.main(batch_options(file, output, server)) == 0
        check(output, server, TEXTS[:40])
        assert len(in_batches(output)) > 2
        assert all(x["status"] == "completed" for x in server.stats()["batches"].values())


def test_a_full_queue_means_fewer_at_once(tmp_path):
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS), tmp_path / "run"
    with serve(tmp_path, batch_queue=40) as server:
        assert triplets.main(batch_options(file, output, server, 20)) == 0
        check(output, server, TEXTS)
        states = [batch["status"] for batch in server.stats()["batches"].values()]
        assert 0 < states.count("failed") < states.count("completed")


def test_batches_that_all_come_to_nothing_end_the_run(tmp_path, capsys):
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:10]), tmp_path / "run"
    with serve(tmp_path, batch_fail=1.0) as server:
        assert triplets.main(batch_options(file, output, server)) == 1
        assert "3 batches came to nothing" in capsys.readouterr().err
        assert "The batch could not be processed" in str(server.stats()["batches"])
        server.change(batch_fail=0.0)
        assert triplets.main(batch_options(file, output, server)) == 0
        check(output, server, TEXTS[:10])


def test_a_batch_whose_creation_is_not_heard_of_is_found(tmp_path, monkeypatch):
    """The answer to the creation is lost once, then the process stops, then it is found again."""
    create, lost = Server.create_batch, []

    async def forgetful(self, file: str, name: str) -> str:
        await create(self, file, name)
        lost.append(name)
        raise (Fault("lost") if len(lost) == 1 else KeyboardInterrupt)

    monkeypatch.setattr(Server, "create_batch", forgetful)
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:40]), tmp_path / "run"
    with serve(tmp_path, polls=3) as server:
        assert triplets.main(batch_options(file, output, server)) == 130
        assert [len(keys) for keys in in_batches(output)] == [30, 10]
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert triplets.main(options(file, output, server)) == 2, "not by requests alone"
        assert triplets.main(batch_options(file, output, server)) == 0
        check(output, server, TEXTS[:40])
        assert len(server.stats()["batches"]) == 2 == len(set(lost))


def test_the_requests_are_those_of_the_other_mode(tmp_path):
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:4]), tmp_path / "run"
    with serve(tmp_path) as server:
        arguments = batch_options(file, output, server)
        assert triplets.main(arguments) == 0
        [batch] = server.stats()["batches"].values()
        [name] = [line["batch"] for line in lines(output) if "captions" in line]
        assert batch["metadata"] == {"ip2p_jax": name}
        assert batch["completion_window"] == "24h"
        question = triplets.question_of(triplets.parser().parse_args(arguments))
        sent = asyncio.run(content(server.url, batch["input_file_id"]))
    rows = [json.loads(line) for line in sent.splitlines()]
    assert [row["body"] for row in rows] == [question.body(text, 1) for text in TEXTS[:4]]
    assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}


def test_lines_that_are_no_output_are_told_of_and_the_others_collected(
    tmp_path, monkeypatch, capsys
):
    """What they should answer is asked again."""
    download, broken = Server.download, []

    async def damaged(self, file, into):
        await download(self, file, into)
        into.seek(0)
        rows = into.read().splitlines(keepends=True)
        if not broken:
            broken.append(file)
            rows[:4] = [
                b'{"custom_id": "half\n',
                b'{"id": 1}\n',
                b"[]\n",
                b'{"custom_id": "z-1"}\n',
            ]
        into.seek(0)
        into.truncate()
        into.writelines(rows)

    monkeypatch.setattr(Server, "download", damaged)
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:20]), tmp_path / "run"
    with serve(tmp_path) as server:
        assert triplets.main(batch_options(file, output, server)) == 0
        assert len(read_triplets(output / "triplets.jsonl")) == 20
        assert [len(keys) for keys in in_batches(output)] == [20, 4]
    told = f"{broken[0]}: 4 lines are no answers of a batch, the first is line 1"
    assert told in capsys.readouterr().err


def test_refusals_after_a_new_start_are_few(tmp_path, monkeypatch, capsys):
    """Batches that a server only refuses cost a run that was begun elsewhere fewer than REFUSALS
    captions, however small they are; a caption that is refused at last is settled."""
    file, output = write_captions(tmp_path / "captions.jsonl", TEXTS[:3]), tmp_path / "run"
    with serve(tmp_path) as server:
        assert triplets.main(batch_options(file, output, server)) == 0
        body = {"error": {"message": "no such field"}}

        def refusing(line):
            read = read_output(line)
            return read and read._replace(status=400, body=body)

        monkeypatch.setattr(batches, "read_output", refusing)
        write_captions(file, TEXTS[:4])
        assert triplets.main(batch_options(file, output, server)) == 0
        assert sum("refused" in line for line in lines(output)) == 1
        write_captions(file, TEXTS[:40])
        assert triplets.main(batch_options(file, output, server, 3)) == 2
        assert "refuses every request" in capsys.readouterr().err
        assert 1 < sum("refused" in line for line in lines(output)) <= REFUSALS


async def content(url: str, file: str) -> str:
    server = Server(url, KEY, 10.0)
    try:
        return (await server.client.files.content(file)).text
    finally:
        await server.close()


@pytest.mark.slow
def test_killed_in_batches_and_started_again(tmp_path):
    """SIGKILL at random moments: no batch is created twice, no answer asked for again."""
    texts = captions(200 * (KILLS + 1))
    file, output = write_captions(tmp_path / "captions.jsonl", texts), tmp_path / "run"
    with serve(tmp_path, seed=6, polls=2, **EXPIRES, **ANSWERS) as server:
        arguments = batch_options(file, output, server, 40)
        started, kills = killed_again_and_again(arguments, output, 0.25)
        check(output, server, texts)
        assert len(server.stats()["batches"]) == len(in_batches(output))
        assert kills == KILLS and expected(server, texts)
    write_row("triplets of texts in batches", started, kills, 0)
