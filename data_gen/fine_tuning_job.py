# SPDX-License-Identifier: Apache-2.0
"""Starts a fine-tuning job on an OpenAI-compatible server, once, and follows it to its end.

Training files are named after what they hold and what is asked for, and a job is known by its
file: a process that was killed before it could write down what it started finds it on the server.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import openai

from data_gen.asking import ServerError
from data_gen.pace import back_off
from data_gen.server import FILE_TIMEOUT, Fault, Refused, Server, with_keys
from ip2p_jax.cli import atomic_path

T = TypeVar("T")

TRIES = 8
"""Failures of one request in a row until the server is said not to work."""

FIRST = 1.0
"""Seconds to wait after a first failure."""

FAILED = ("failed", "cancelled")


@dataclass(frozen=True)
class Order:
    """What is asked for: files of chat lines, and how a model is to be made of them."""

    training: Path
    validation: Path | None
    model: str
    epochs: int
    suffix: str

    def name(self) -> str:
        """A name that stands for all of it."""
        digest = sha256(repr((self.model, self.epochs, self.suffix)).encode())
        for file in (self.training, self.validation):
            digest.update(sha256(file.read_bytes() if file else b"").digest())
        return f"ip2p-{digest.hexdigest()[:16]}"


@dataclass
class Job:
    """The job of an order on a server, as far as the file `kept` says.

    told: is called with every event of the job; at: with a line on where it is.
    """

    order: Order
    server: Server
    kept: Path
    told: Callable[[str], None] = lambda _: None
    at: Callable[[str], None] = lambda _: None

    async def run(self, poll: float) -> dict[str, Any]:
        """Returns the record of a job that succeeded or failed; looks every `poll` seconds.

        Raises ServerError if the server does not work, ValueError if it will not.
        """
        record = read_record(self.kept, self.order, self.server.name)
        try:
            if record["status"] not in (*FAILED, "succeeded"):
                await self.start(record)
                await self.follow(record, poll)
        except Refused as error:
            raise ValueError(f"{self.server.name} refuses: {error}") from None
        finally:
            await self.server.close()
        return record

    async def start(self, record: dict[str, Any]) -> None:
        """Uploads the files and creates the job, as far as that is still to be done."""
        name = self.order.name()
        for part in ("training", "validation"):
            file = getattr(self.order, part)
            if file and f"{part}_file" not in record:
                self.at(f"uploading {file}")
                record[f"{part}_file"] = await self.patiently(
                    lambda file=file, part=part: self.uploaded(file, f"{name}-{part}.jsonl")
                )
                write_record(self.kept, record)
        if "job" not in record:
            self.at("creating the job")
            record["job"] = await self.patiently(lambda: self.created(record))
            write_record(self.kept, record)

    async def uploaded(self, path: Path, name: str) -> str:
        """The id of the server's file of this name, which is uploaded if there is none."""
        files = self.server.client.files.with_raw_response
        size = path.stat().st_size
        async for file in self.server.listed(files.list, purpose="fine-tune"):
            if file.get("filename") == name and file.get("bytes") == size:
                return file["id"]
        create = files.create(file=(name, path.read_bytes()), purpose="fine-tune")
        return (await self.server.called(create, "id", timeout=FILE_TIMEOUT))["id"]

    async def created(self, record: Mapping[str, Any]) -> str:
        """The id of the server's job for the uploaded file, which is created if there is none."""
        jobs, order = self.server.client.fine_tuning.jobs.with_raw_response, self.order
        async for job in self.server.listed(jobs.list):
            same = job.get("training_file") == record["training_file"]
            if same and job.get("status") not in FAILED:
                return job["id"]
        create = jobs.create(
            model=order.model,
            training_file=record["training_file"],
            validation_file=record.get("validation_file", openai.omit),
            suffix=order.suffix or openai.omit,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": order.epochs}},
            },
        )
        return (await self.server.called(create, "id"))["id"]

    async def follow(self, record: dict[str, Any], poll: float) -> None:
        """Waits for the end of the job and writes down what it ended as."""
        jobs, id = self.server.client.fine_tuning.jobs.with_raw_response, record["job"]
        seen: set[str] = set()
        while True:
            job = await self.patiently(
                lambda: self.server.called(jobs.retrieve(id), "id", "status")
            )
            self.tell(job, await self.patiently(lambda: self.events(id)), seen)
            if job["status"] in (*FAILED, "succeeded"):
                record |= {"status": job["status"], "model": job.get("fine_tuned_model")}
                record["trained_tokens"] = job.get("trained_tokens")
                record["error"] = (job.get("error") or {}).get("message")
                write_record(self.kept, record)
                return
            await asyncio.sleep(poll)

    async def events(self, id: str) -> list[dict[str, Any]]:
        """The latest events of the job, the newest first."""
        list_events = self.server.client.fine_tuning.jobs.with_raw_response.list_events
        values = await self.server.called(list_events(id, limit=100), "data")
        return [with_keys(event, "id", "message") for event in values["data"]]

    def tell(self, job: Mapping[str, Any], events: list[dict[str, Any]], seen: set[str]) -> None:
        """Tells events that are new, the oldest first, and where the job is."""
        new = [event for event in reversed(events) if event["id"] not in seen]
        seen.update(event["id"] for event in new)
        for event in new:
            if event.get("type") != "metrics":
                self.told(event["message"])
        steps = [event["message"] for event in events if event.get("type") == "metrics"]
        self.at(", ".join([f"{job['id']} {job['status'].replace('_', ' ')}", *steps[:1]]))

    async def patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        """Repeats what fails, with longer and longer waits between."""
        failures = 0
        while True:
            try:
                return await action()
            except Fault as fault:
                failures += 1
                if failures > TRIES:
                    raise ServerError(f"{self.server.name} does not answer ({fault})") from None
                await asyncio.sleep(max(fault.wait or 0.0, back_off(FIRST, failures)))


def read_record(file: Path, order: Order, server: str) -> dict[str, Any]:
    """What is known of the job of an order. ValueError if the file tells of another."""
    asked = {"name": order.name(), "server": server, "base": order.model, "status": "new"}
    if not file.exists():
        return asked
    record = json.loads(file.read_text())
    for key in ("server", "base", "name"):
        if record[key] != asked[key]:
            raise ValueError(
                f"{file}: is of another job ({key} {record[key]}, now {asked[key]}); give another "
                "--output, or remove it to start anew"
            )
    return record


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    with atomic_path(file) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
