# SPDX-License-Identifier: Apache-2.0
"""Requests to an OpenAI-compatible server, one at a time, and what their failures mean.

The `openai` client with its aiohttp transport (its other one takes half as much time again) and
without its own retries. Answers are taken as they come and read here, because servers differ, and
faults do more so. A key never gets into a message.
"""

import asyncio
import email.utils
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import aiohttp
import httpx2
import openai

from data_gen.server_url import check_url

MINUTE = 60.0  # seconds
FILE_TIMEOUT = 60 * MINUTE
"""For an upload or a download, which may be 200 MB."""

OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")


class Fault(Exception):
    """A request that came to nothing and may come to something later.

    limited: the server said that there were too many; busy: fewer at once would be better (so too
    where it did not answer in time); wait: the seconds that it asks for, or None.
    """

    def __init__(
        self, text: str, *, limited: bool = False, busy: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(text)
        self.limited, self.busy, self.wait = limited, busy or limited, wait


class Refused(Exception):
    """A request that the server will never take as it is."""


class Said(NamedTuple):
    """An answer: its text, the server's finish_reason, tokens of the request and of the answer."""

    answer: str
    finish: str
    tokens: tuple[int, int]


class Server:
    """A server at `base_url` (None: OpenAI's) that has to answer within `timeout` seconds."""

    def __init__(self, base_url: str | None, key: str, timeout: float) -> None:
        self.key, self.timeout = key, timeout
        self.client = openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url,
            max_retries=0,
            timeout=None,  # of each read; `called` limits the whole
            http_client=openai.DefaultAioHttpClient(),
        )
        self.name = str(self.client.base_url).rstrip("/")

    async def close(self) -> None:
        await self.client.close()

    async def chat(self, body: Mapping[str, Any], once: str) -> Said:
        """Asks for a chat completion.

        once: the Idempotency-Key; a server that knows it does not answer, and charge, twice.
        """
        request = self.client.post(  # `chat.completions.create` checks types for 2 ms
            "/chat/completions",
            body=body,
            cast_to=httpx2.Response,
            options={"headers": {"Idempotency-Key": once}},
        )
        return said(await self.called(request))

    async def moderate(self, model: str, texts: Sequence[str]) -> list[list[str]]:
        """The categories in which each text is flagged; none for a text that is not."""
        values = await self.called(
            self.client.moderations.with_raw_response.create(model=model, input=list(texts)),
            "results",
        )
        try:
            found = [flags(result) for result in values["results"]]
        except (KeyError, TypeError, AttributeError):
            raise Fault("moderation that is not what the API says") from None
        if len(found) != len(texts):
            raise Fault(f"moderation of {len(found)} texts, asked were {len(texts)}")
        return found

    async def upload(self, file: IO[bytes], name: str) -> str:
        """Uploads the requests of a batch; returns the file's id."""
        file.seek(0)
        create = self.client.files.with_raw_response.create(file=(name, file), purpose="batch")
        return (await self.called(create, "id", timeout=FILE_TIMEOUT))["id"]

    async def create_batch(self, file: str, name: str) -> str:
        """Starts a batch of an uploaded file; returns its id."""
        values = await self.called(
            self.client.batches.with_raw_response.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"ip2p_jax": name},
            ),
            "id",
        )
        return values["id"]

    async def find_batch(self, name: str) -> str | None:
        """The id of the batch that was created under a name, or None if the server has none."""
        async for batch in self.listed(self.client.batches.with_raw_response.list):
            if (batch.get("metadata") or {}).get("ip2p_jax") == name:
                return batch["id"]
        return None

    async def listed(
        self, page: Callable[..., Awaitable[Any]], **asked: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """All that a list of the server holds, asked for page by page; each has an id."""
        after = openai.omit
        while True:
            values = await self.called(page(limit=100, after=after, **asked), "data")
            for item in values["data"]:
                after = with_keys(item, "id")["id"]
                yield item
            if not values["data"] or not values.get("has_more"):
                return

    async def batch(self, id: str) -> dict[str, Any]:
        """What the server says of a batch now."""
        return await self.called(self.client.batches.with_raw_response.retrieve(id), "status")

    async def download(self, file: str, into: IO[bytes]) -> None:
        """Writes a file of the server into an empty one, from its beginning."""
        into.seek(0)
        into.truncate()
        with self.meanings(FILE_TIMEOUT):
            async with (
                asyncio.timeout(FILE_TIMEOUT),
                self.client.files.with_streaming_response.content(file) as response,
            ):
                async for block in response.iter_bytes():
                    into.write(block)

    async def called(
        self, request: Awaitable[Any], *wanted: str, timeout: float | None = None
    ) -> dict[str, Any]:
        """The JSON object of an answer that comes within `timeout` seconds (None: the usual), with
        all keys that are wanted.

        Raises Fault, Refused, or ValueError where no request will do.
        """
        seconds = timeout or self.timeout
        with self.meanings(seconds):
            async with asyncio.timeout(seconds):
                response = await request
        try:
            values = json.loads(response.content)
        except (ValueError, RecursionError):
            values = None
        return with_keys(values, *wanted)

    @contextmanager
    def meanings(self, seconds: float) -> Iterator[None]:
        """Turns the errors of the client into ours."""
        try:
            yield
        except TimeoutError:
            raise Fault(f"no answer within {seconds:g} s", busy=True) from None
        except openai.APIStatusError as error:
            raise self.meaning(error) from None
        except (openai.APIConnectionError, aiohttp.ClientError, httpx2.HTTPError) as error:
            raise Fault(f"connection: {error.__cause__ or error}") from None

    def meaning(self, error: openai.APIStatusError) -> Exception:
        """What a status other than 200 means."""
        status = error.status_code
        text = f"{status}, {error.message}".replace(self.key, "***")
        if status in (400, 413, 422):
            return Refused(text)
        if error.code in OUT_OF_MONEY or not (status in (408, 409, 429) or status >= 500):
            return ValueError(f"{self.name} says {text}")
        wait = seconds_to_wait(error.response.headers)
        return Fault(text, limited=status == 429, busy=status in (429, 503), wait=wait)


def server_at(url: str | None, name: str, timeout: float) -> Server:
    """A server (None: what OPENAI_BASE_URL says, or OpenAI's) with the key that the environment
    has under a name; OpenAI's needs one, others may not. ValueError says what is wrong."""
    if url is None and (url := os.environ.get("OPENAI_BASE_URL") or None):
        check_url("OPENAI_BASE_URL", url)
    key = os.environ.get(name)
    if not key and url is None:
        raise ValueError(f"{name} is not set, and OpenAI's server wants a key")
    return Server(url, key or "none", timeout)


def with_keys(values: Any, *wanted: str) -> dict[str, Any]:
    """What a server said, if that is a JSON object that holds what is wanted; Fault if not."""
    if not isinstance(values, dict):
        raise Fault("an answer that is not a JSON object")
    if missing := [name for name in wanted if values.get(name) is None]:
        raise Fault(f"an answer without {missing[0]!r}")
    return values


def said(values: Mapping[str, Any]) -> Said:
    """Reads a chat completion; Fault if it is none."""
    try:
        choice = values["choices"][0]
        message, usage = choice["message"], values.get("usage") or {}
        text, finish = message.get("content"), choice.get("finish_reason")
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Fault("an answer that is no chat completion") from None
    if not isinstance(text, str):  # a refusal, as a rule
        text, finish = str(message.get("refusal") or ""), "content_filter"
    return Said(text, str(finish), tokens)


def flags(result: Mapping[str, Any]) -> list[str]:
    """The categories in which moderation flags a text; ["flagged"] where it names none."""
    if not result["flagged"]:
        return []
    categories = result.get("categories") or {}
    return sorted(name for name, flagged in categories.items() if flagged) or ["flagged"]


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """What retry-after-ms or Retry-After (seconds, or a date) asks for, or None."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" not in headers:
            return None
        value = headers["retry-after"]
        if value.strip()[:1].isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
