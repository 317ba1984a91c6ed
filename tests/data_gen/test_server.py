# SPDX-License-Identifier: Apache-2.0
"""Claims: what a server does wrong is told apart: to be asked again, and when; never to be asked
again; no request will do. An answer is read whatever it says; the key is in no message. Addresses
that hold a key, or are none, are refused.
"""

import asyncio
import email.utils
import io
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from data_gen.server import Fault, Refused, Said, Server, seconds_to_wait, server_at
from data_gen.server_url import check_url

KEY = "sk-secret"
GOOD = {"message": {"content": "hello"}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2}


def asked(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]], timeout: float = 5.0
) -> Said:
    """What a chat with a server that answers so comes to."""
    return done(answer, lambda server: server.chat({"model": "m", "messages": []}, "once"), timeout)


def done(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    request: Callable[[Server], Awaitable[Any]],
    timeout: float = 5.0,
) -> Any:
    """What a request to a server that answers so comes to."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/v1/{path:.*}", answer)
        async with TestServer(app) as there:
            server = Server(str(there.make_url("/v1")), KEY, timeout)
            try:
                return await request(server)
            finally:
                await server.close()

    return asyncio.run(run())


def says(body: Any, status: int = 200, **headers: str):
    async def answer(_: web.Request) -> web.Response:
        if isinstance(body, str):
            return web.Response(text=body, status=status, headers=headers)
        return web.json_response(body, status=status, headers=headers)

    return answer


def error(code: str | None = None) -> dict:
    return {"error": {"message": f"it is {KEY}", "type": "x", "code": code}}


def test_an_answer():
    seen = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(await request.json(), once=request.headers["Idempotency-Key"])
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        return web.json_response({"choices": [GOOD], "usage": USAGE})

    assert asked(answer) == Said("hello", "stop", (7, 2))
    assert seen == {"model": "m", "messages": [], "once": "once"}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({**GOOD, "finish_reason": "length"}, Said("hello", "length", (0, 0))),
        ({**GOOD, "finish_reason": None}, Said("hello", "None", (0, 0))),
        ({"message": {"content": None, "refusal": "no"}}, Said("no", "content_filter", (0, 0))),
        ({"message": {}}, Said("", "content_filter", (0, 0))),
    ],
)
def test_odd_answers_are_read(choice, expected):
    assert asked(says({"choices": [choice]})) == expected


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}])
def test_tokens_that_are_not_counted(usage):
    assert asked(says({"choices": [GOOD], "usage": usage})) == Said("hello", "stop", (0, 0))


@pytest.mark.parametrize(
    "results", [[], [{"flagged": False}], [{"flagged": False}] * 3, 3, {"a": {}, "b": {}}]
)
def test_moderation_of_other_than_what_was_asked_is_asked_again(results):
    with pytest.raises(Fault, match="moderation"):
        done(says({"results": results}), lambda server: server.moderate("m", ["a", "b"]))


@pytest.mark.parametrize("body", [{}, {"id": None}, {"data": [{}]}, {"data": [3]}, {"data": None}])
@pytest.mark.parametrize(
    "request_of",
    [
        lambda server: server.upload(io.BytesIO(), "x.jsonl"),
        lambda server: server.create_batch("file", "x"),
        lambda server: server.find_batch("x"),
        lambda server: server.batch("x"),
    ],
)
def test_what_lacks_what_it_must_hold_is_asked_again(request_of, body):
    with pytest.raises(Fault, match="an answer (without '(id|data|status)'|that is not a JSON)"):
        done(says(body), request_of)


def test_a_batch_is_found_on_a_later_page():
    async def answer(request: web.Request) -> web.Response:
        if request.query.get("after") != "a":
            return web.json_response({"data": [{"id": "a"}], "has_more": True})
        return web.json_response({"data": [{"id": "b", "metadata": {"ip2p_jax": "x"}}]})

    assert done(answer, lambda server: server.find_batch("x")) == "b"
    assert done(says({"data": [], "has_more": True}), lambda server: server.find_batch("x")) is None


@pytest.mark.parametrize(
    "body",
    ['{"choices": [', "[]", "", {}, {"choices": []}, {"error": "overloaded"}, {"choices": [3]}],
)
def test_what_is_no_answer_is_asked_again(body):
    with pytest.raises(Fault) as raised:
        asked(says(body))
    assert not raised.value.busy


@pytest.mark.parametrize(
    ("status", "limited", "busy"),
    [(429, True, True), (503, False, True), (500, False, False), (502, False, False)]
    + [(408, False, False), (409, False, False)],
)
def test_faults_that_pass(status, limited, busy):
    with pytest.raises(Fault) as raised:
        asked(says(error(), status, **{"Retry-After": "7"}))
    fault = raised.value
    assert (fault.limited, fault.busy, fault.wait) == (limited, busy, 7.0)
    assert str(status) in str(fault) and KEY not in str(fault) and "***" in str(fault)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_requests_that_are_refused(status):
    with pytest.raises(Refused, match=str(status)) as raised:
        asked(says(error(), status))
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "code"), [(401, None), (403, None), (404, None), (429, "insufficient_quota")]
)
def test_what_no_request_will_mend(status, code):
    with pytest.raises(ValueError, match=f"/v1 says {status}") as raised:
        asked(says(error(code), status))
    assert KEY not in str(raised.value)


def test_an_answer_that_drips_is_too_late():
    """The time is that of the whole answer, not of the next byte."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    began = time.monotonic()
    with pytest.raises(Fault, match="no answer within 0.3 s") as raised:
        asked(answer, timeout=0.3)
    assert raised.value.busy and not raised.value.limited and time.monotonic() - began < 3


def test_broken_connections():
    async def reset(request: web.Request) -> web.Response:
        assert request.transport
        request.transport.abort()
        return web.Response()

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 100
        await response.prepare(request)
        await response.write(b'{"choices": [')
        assert request.transport
        request.transport.close()
        return response

    for answer in (reset, half):
        with pytest.raises(Fault, match="connection: ") as raised:
            asked(answer)
        assert not raised.value.busy


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "3", "retry-after-ms": "150"}, 0.15),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_when_to_come_again(headers, expected):
    assert seconds_to_wait(headers) == expected


def test_when_to_come_again_as_a_date():
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    wait = seconds_to_wait({"retry-after": date})
    assert wait is not None and 55 < wait <= 60


def test_keys_come_from_the_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "MODERATION_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        server_at(None, "OPENAI_API_KEY", 1.0)
    assert server_at("http://127.0.0.1:1/v1", "OPENAI_API_KEY", 1.0).key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert server_at(None, "OPENAI_API_KEY", 1.0).key == KEY
    assert server_at("http://127.0.0.1:1/v1", "MODERATION_API_KEY", 1.0).key == "none"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@x/v1",
        "http://x/v1?api_key=secret",
        "http://x/v1#secret",
        "http://x:secret/v1",
    ]
    + [
        "http://[::1/v1",
        "http://x:99999/v1",
        "http://x y/v1",
        "http://x\t/v1",
        "x:80",
        "ftp://x",
        "",
    ],
)
def test_addresses_that_hold_a_key_or_are_none(url, monkeypatch):
    """Nor are they repeated."""
    with pytest.raises(ValueError, match="^--base-url: expected http.s.://host/path") as raised:
        check_url("--base-url", url)
    assert "secret" not in str(raised.value)
    if url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(ValueError, match="^OPENAI_BASE_URL: expected http"):
            server_at(None, "OPENAI_API_KEY", 1.0)
    for good in (None, "http://x/v1", "https://[::1]:80/"):
        check_url("--base-url", good)
