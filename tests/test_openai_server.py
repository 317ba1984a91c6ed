# SPDX-License-Identifier: Apache-2.0
"""Claims: the server that other tests trust says what its seed says, whatever the order; what it
logs as sent and nothing else arrives; a repeated Idempotency-Key is paid once; batches expire half
done. Spoken to with the openai client."""

import asyncio
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.openai_server import FLAGGED, KEY, Faults, answer, serve

CAPTIONS = [f"a cat, number {i}" for i in range(60)]
ANSWERS = {"malformed": 0.1, "schema": 0.1, "cut": 0.1, "same": 0.1, "unsafe": 0.1, "refusal": 0.1}
TRANSPORT = {"rate_limit": 0.1, "server_error": 0.1, "reset": 0.1, "half": 0.1, "lost": 0.1}


def client(server, retries=8):
    return openai.OpenAI(api_key=KEY, base_url=server.url, max_retries=retries)


def ask(api, caption, **more):
    turn = {"role": "user", "content": caption}
    return api.chat.completions.create(model="m", messages=[turn], **more)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of connections that were reset
def test_what_is_sent_arrives_and_is_what_the_seed_says(tmp_path):
    with serve(tmp_path, seed=5, retry_after=0.01, **ANSWERS, **TRANSPORT) as server:
        with client(server) as api, ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda x: ask(api, x), CAPTIONS[::-1]))
        log, paid, faults = server.log(), server.paid(), server.stats()["faults"]
    assert {x.id for x in got} == {x.id for x in log if x.sent}
    assert {x.id for x in log if not x.sent} and set(faults) == set(TRANSPORT)
    assert set(paid) == set(CAPTIONS) and all(len(x) == 1 for x in paid.values())
    made = Faults(seed=5, **ANSWERS)
    for x in log:
        assert (x.kind, x.content) == answer(x.caption, x.number, made)
    kinds = Counter(x.kind for x in log)
    assert set(kinds) == {"good", *ANSWERS} and kinds["good"] > 20
    assert answer("a", 0, made) != answer("a", 0, Faults(seed=6, **ANSWERS))


def test_a_repeated_key_is_paid_once(tmp_path):
    with serve(tmp_path) as server, client(server) as api:
        ids = [ask(api, "a", extra_headers={"Idempotency-Key": key}).id for key in "xxy"]
        assert ids[0] == ids[1] != ids[2]
        assert len(server.log()) == 3 and len(server.paid()["a"]) == 2


def test_a_client_that_goes_away_pays_nothing(tmp_path):
    async def leave(server):
        async with openai.AsyncOpenAI(api_key=KEY, base_url=server.url, max_retries=0) as connected:
            turn = {"role": "user", "content": "a"}
            asked = connected.chat.completions.create(model="m", messages=[turn])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asked, 0.2)

    with serve(tmp_path, latency=0.5) as server, client(server) as api:
        asyncio.run(leave(server))
        assert ask(api, "b").choices
        assert [x.caption for x in server.log()] == ["b"]


def test_a_batch_expires_half_done(tmp_path):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = "".join(json.dumps(line | {"custom_id": str(i)}) + "\n" for i in range(10))
    with serve(tmp_path, batch_expire=1.0) as server, client(server) as api:
        file = api.files.create(file=("a.jsonl", lines.encode()), purpose="batch")
        batch = api.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        states = [batch.status]
        while batch.status != "expired":
            batch = api.batches.retrieve(batch.id)
            states.append(batch.status)
        done, not_done = (
            {x["custom_id"]: x for x in map(json.loads, api.files.content(id).text.splitlines())}
            for id in (batch.output_file_id or "", batch.error_file_id or "")
        )
        assert states == ["validating", "in_progress", "finalizing", "expired"]
        assert len(done) == len(not_done) == 5 and len({*done, *not_done}) == 10
        assert {x["error"]["code"] for x in not_done.values()} == {"batch_expired"}
        assert [x.custom_id for x in server.log()] == list(done)


def test_moderation_and_keys(tmp_path):
    with serve(tmp_path) as server:
        with client(server) as api:
            flagged = api.moderations.create(input=["a cat", f"a {FLAGGED} cat"]).results
            assert [x.flagged for x in flagged] == [False, True]
        with openai.OpenAI(api_key="other", base_url=server.url, max_retries=0) as api:
            with pytest.raises(openai.AuthenticationError):
                api.models.list()
