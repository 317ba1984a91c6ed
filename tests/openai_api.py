# SPDX-License-Identifier: Apache-2.0
"""The paths of the server of openai_server.py, which says what they do."""

import asyncio
import itertools
import json
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.openai_answers import (
    FLAGGED,
    KEY,
    TRANSPORT,
    Answered,
    Faults,
    answer,
    caption_of,
    chosen,
    completion,
    draw,
    now,
    refused,
)


class Api:
    """The state of the server and what answers each path."""

    def __init__(self, faults: Faults, log: Path):
        self.faults, self.opened = faults, log.open("a", encoding="utf-8")
        self.numbers, self.asked, self.streaks = Counter(), Counter(), Counter()
        self.requests, self.seen_faults = Counter(), Counter()
        self.ids = itertools.count(1)
        self.replies: dict[str, tuple[dict, Answered | None]] = {}
        self.files: dict[str, tuple[dict, bytes]] = {}
        self.batches: dict[str, dict] = {}
        self.jobs: dict[str, dict] = {}
        self.events: dict[str, list[dict]] = {}
        self.chats = self.peak = 0
        self.allowance, self.filled = faults.per_second, time.monotonic()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30, middlewares=[self.guard])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/moderations", self.moderate),
                web.get("/v1/models", self.models),
                web.post("/v1/files", self.upload),
                web.get(
                    "/v1/files", lambda _: self.listed([meta for meta, _ in self.files.values()])
                ),
                web.get("/v1/files/{id}", self.file),
                web.get("/v1/files/{id}/content", self.content),
                web.delete("/v1/files/{id}", self.delete),
                web.post("/v1/fine_tuning/jobs", self.create_job),
                web.get("/v1/fine_tuning/jobs", lambda _: self.listed(list(self.jobs.values()))),
                web.get("/v1/fine_tuning/jobs/{id}", self.job),
                web.get("/v1/fine_tuning/jobs/{id}/events", self.job_events),
                web.post("/v1/fine_tuning/jobs/{id}/cancel", self.cancel_job),
                web.post("/v1/batches", self.create_batch),
                web.get("/v1/batches", lambda _: self.listed(list(self.batches.values()))),
                web.get("/v1/batches/{id}", self.batch),
                web.post("/v1/batches/{id}/cancel", self.cancel_batch),
                web.get("/stats", self.stats),
                web.post("/faults", self.change),
            ]
        )
        return app

    # What stands between a request and its answer

    @web.middleware
    async def guard(self, request: web.Request, handler) -> web.StreamResponse:
        """Key, transport faults, answers given before."""
        if not request.path.startswith("/v1/"):
            return await handler(request)
        self.requests[f"{request.method} {request.path}"] += 1
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return refused(401, "Incorrect API key provided.", "invalid_api_key")
        chat = request.path.endswith("/chat/completions")
        try:
            key = caption_of(await request.json()) if chat else f"{request.method} {request.path}"
        except (ValueError, TypeError, KeyError) as error:
            return refused(400, str(error))
        if chat and (wait := self.too_fast()):
            return self.limited(wait)
        fault = self.fault(key)
        if fault == "rate_limit":
            return self.limited(self.faults.retry_after)
        if fault == "server_error":
            return refused(500, "The server had an error.", "server_error")
        if fault == "timeout":
            await asyncio.sleep(self.faults.hold)
        if fault in ("timeout", "reset"):
            return self.dropped(request)
        return await self.replied(request, handler, fault)

    async def replied(self, request: web.Request, handler, fault: str | None):
        """The handler's answer, or the one given to the same Idempotency-Key; sent, or lost."""
        key = request.headers.get("Idempotency-Key")
        if key and key in self.replies:
            body, answered = self.replies[key]
            response: web.Response = web.json_response(body)
        else:
            response = await handler(request)
            answered = request.get("answered")
            if key and response.status == 200 and isinstance(response.text, str):
                self.replies[key] = json.loads(response.text), answered
        if answered:
            self.write(answered._replace(sent=fault is None))
        if fault == "lost":
            return self.dropped(request)
        return await self.half(request, response) if fault == "half" else response

    def fault(self, key: str) -> str | None:
        """The transport fault of this request, at most `streak` in a row."""
        self.asked[key] += 1
        fault = chosen(self.faults, TRANSPORT, "transport", key, self.asked[key])
        if self.streaks[key] >= self.faults.streak:
            fault = None
        self.streaks[key] = self.streaks[key] + 1 if fault else 0
        if fault:
            self.seen_faults[fault] += 1
        return fault

    def too_fast(self) -> float:
        """Seconds until another chat is allowed: a bucket that holds one second's worth."""
        if not (rate := self.faults.per_second):
            return 0.0
        t = time.monotonic()
        self.allowance = min(rate, self.allowance + (t - self.filled) * rate)
        self.filled = t
        if self.allowance < 1:
            self.seen_faults["per_second"] += 1
            return (1 - self.allowance) / rate
        self.allowance -= 1
        return 0.0

    def limited(self, wait: float) -> web.Response:
        return refused(
            429, "Rate limit reached.", "rate_limit_exceeded", **{"Retry-After": f"{wait:.3f}"}
        )

    def dropped(self, request: web.Request) -> web.Response:
        """Resets the connection."""
        if request.transport:
            request.transport.abort()
        return web.Response()

    async def half(self, request: web.Request, response: web.Response) -> web.StreamResponse:
        """Sends the headers and the first half of the body."""
        body = bytes(response.body) if isinstance(response.body, bytes | bytearray) else b""
        broken = web.StreamResponse(status=response.status)
        broken.content_type, broken.content_length = response.content_type, len(body)
        await broken.prepare(request)
        await broken.write(body[: len(body) // 2])
        if request.transport:
            request.transport.close()
        return broken

    def write(self, answered: Answered) -> None:
        self.opened.write(json.dumps(answered._asdict()) + "\n")
        self.opened.flush()

    def new(self, kind: str) -> str:
        return f"{kind}-{next(self.ids):06d}"

    # Chat and moderation

    def answered(self, caption: str, via: str, custom_id: str | None = None) -> Answered:
        number = self.numbers[caption]
        self.numbers[caption] += 1
        kind, content = answer(caption, number, self.faults)
        return Answered(self.new("chatcmpl"), via, custom_id, caption, number, kind, content, True)

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.chats += 1
        self.peak = max(self.peak, self.chats)
        try:
            await asyncio.sleep(self.faults.latency)
        finally:
            self.chats -= 1
        request["answered"] = said = self.answered(caption_of(body), "chat")
        return web.json_response(completion(said.id, body["model"], said.kind, said.content))

    async def moderate(self, request: web.Request) -> web.Response:
        body = await request.json()
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        names = ("harassment", "hate", "self-harm", "sexual", "violence")
        results = []
        for text in texts:
            flagged = FLAGGED in text.lower()
            values = {name: flagged and name == "violence" for name in names}
            scores = {name: float(value) for name, value in values.items()}
            results.append({"flagged": flagged, "categories": values, "category_scores": scores})
        model = body.get("model", "omni-moderation-latest")
        return web.json_response({"id": self.new("modr"), "model": model, "results": results})

    async def models(self, _: web.Request) -> web.Response:
        names = ["tiny-chat", *(job["fine_tuned_model"] for job in self.jobs.values())]
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "us"} for n in names if n]
        return await self.listed(data)

    async def listed(self, data: list[dict]) -> web.Response:
        """All at once, the newest first."""
        return web.json_response({"object": "list", "data": data[::-1], "has_more": False})

    # Files

    def store(self, name: str, content: bytes, purpose: str) -> dict:
        meta = {"id": self.new("file"), "object": "file", "bytes": len(content)}
        meta |= {"created_at": now(), "filename": name, "purpose": purpose, "status": "processed"}
        self.files[meta["id"]] = meta, content
        return meta

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file, purpose = form.get("file"), str(form.get("purpose"))
        if not isinstance(file, web.FileField) or purpose not in ("batch", "fine-tune"):
            return refused(400, "Expected a file and a purpose of batch or fine-tune.")
        return web.json_response(self.store(file.filename, file.file.read(), purpose))

    def found(self, request: web.Request, things: dict[str, Any]) -> Any:
        id = request.match_info["id"]
        if id not in things:
            error = {"error": {"message": f"No such object: {id}", "code": "not_found"}}
            raise web.HTTPNotFound(text=json.dumps(error), content_type="application/json")
        return things[id]

    async def file(self, request: web.Request) -> web.Response:
        return web.json_response(self.found(request, self.files)[0])

    async def content(self, request: web.Request) -> web.Response:
        body = self.found(request, self.files)[1]
        return web.Response(body=body, content_type="application/octet-stream")

    async def delete(self, request: web.Request) -> web.Response:
        self.found(request, self.files)
        id = request.match_info["id"]
        del self.files[id]
        return web.json_response({"id": id, "object": "file", "deleted": True})

    # Fine-tuning

    async def create_job(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["training_file"] not in self.files:
            return refused(400, f"invalid training_file: {body['training_file']}")
        job = {"id": self.new("ftjob"), "object": "fine_tuning.job", "created_at": now()}
        job |= {"model": body["model"], "training_file": body["training_file"], "seed": 0}
        job |= {"validation_file": body.get("validation_file"), "result_files": []}
        job |= {"fine_tuned_model": None, "finished_at": None, "trained_tokens": None}
        job |= {"status": "validating_files", "error": None, "organization_id": "org-tests"}
        supervised = (body.get("method") or {}).get("supervised") or {}
        job |= {"hyperparameters": supervised.get("hyperparameters", {"n_epochs": "auto"})}
        job |= {"metadata": body.get("metadata"), "polls": 0, "suffix": body.get("suffix")}
        self.jobs[job["id"]] = job
        self.events[job["id"]] = []
        self.say(job, f"Created fine-tuning job: {job['id']}")
        return web.json_response(job)

    def say(self, job: dict, message: str, **data: Any) -> None:
        event = {"id": self.new("ftevent"), "object": "fine_tuning.job.event"}
        event |= {"created_at": now(), "level": "info", "message": message, "data": data}
        self.events[job["id"]].append(event | {"type": "metrics" if data else "message"})

    def trained_lines(self, job: dict) -> int:
        """How many examples the file holds; ValueError as the real check words it."""
        lines = self.files[job["training_file"]][1].decode().splitlines()
        for number, line in enumerate(lines, 1):
            roles = [message["role"] for message in json.loads(line)["messages"]]
            if roles[-1:] != ["assistant"]:
                raise ValueError(f"Line {number}: the last message is not the assistant's")
        if len(lines) < 10:
            raise ValueError(
                f"Training file has {len(lines)} example(s), but must have at least 10"
            )
        return len(lines)

    async def job(self, request: web.Request) -> web.Response:
        job = self.found(request, self.jobs)
        states = ("validating_files", "queued", "running", "succeeded")
        if job["status"] in states[:-1]:
            job["polls"] += 1
            if job["polls"] % self.faults.polls == 0:
                self.advance(job, states[states.index(job["status"]) + 1])
        return web.json_response(job)

    def advance(self, job: dict, state: str) -> None:
        try:
            lines = self.trained_lines(job)
            if self.faults.job_fail and state == "succeeded":
                raise ValueError("The job failed due to an internal error.")
        except (ValueError, KeyError, IndexError) as error:
            state = "failed"
            job["error"] = {"code": "invalid_training_file", "message": str(error), "param": None}
        job["status"] = state
        self.say(job, f"The job is {state}")
        if state == "running":
            for step in range(1, 4):
                self.say(job, f"Step {step}/3", step=step, total_steps=3, train_loss=1.0 / step)
        if state == "succeeded":
            name = f"ft:{job['model']}:tests:{job['suffix'] or ''}:{job['id'][-6:]}"
            job |= {"fine_tuned_model": name, "finished_at": now(), "trained_tokens": 60 * lines}

    async def job_events(self, request: web.Request) -> web.Response:
        self.found(request, self.jobs)
        return await self.listed(self.events[request.match_info["id"]])

    async def cancel_job(self, request: web.Request) -> web.Response:
        job = self.found(request, self.jobs)
        job["status"] = "cancelled"
        return web.json_response(job)

    # Batches

    async def create_batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["input_file_id"] not in self.files or body["endpoint"] != "/v1/chat/completions":
            return refused(400, "Expected an uploaded file and the endpoint /v1/chat/completions.")
        batch = {"id": self.new("batch"), "object": "batch", "created_at": now(), "polls": 0}
        batch |= {"input_file_id": body["input_file_id"], "endpoint": body["endpoint"]}
        batch |= {"completion_window": body["completion_window"], "status": "validating"}
        batch |= {"output_file_id": None, "error_file_id": None, "errors": None}
        batch |= {"metadata": body.get("metadata"), "number": len(self.batches)}
        self.batches[batch["id"]] = batch
        self.validate(batch)
        return web.json_response(batch)

    def validate(self, batch: dict) -> None:
        """Counts the requests; a batch that breaks a rule fails at once."""
        content = self.files[batch["input_file_id"]][1]
        running = [b for b in self.batches.values() if b["status"] in ("in_progress", "validating")]
        errors, ids = [], set()
        lines = content.decode().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
                caption_of(item["body"])
                if item["custom_id"] in ids:
                    raise ValueError("The custom_id is already used")
                ids.add(item["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                errors.append({"code": "invalid_line", "message": str(error), "line": number})
        batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
        if len(lines) > self.faults.batch_requests or len(content) > self.faults.batch_bytes:
            errors.append({"code": "too_many_tasks", "message": "The file is over the limit"})
        if sum(b["request_counts"]["total"] for b in running) > self.faults.batch_queue:
            errors.append({"code": "token_limit_exceeded", "message": "Enqueued limit reached"})
        if draw(self.faults.seed, "fail", batch["number"]) < self.faults.batch_fail:
            errors.append({"code": "internal", "message": "The batch could not be processed"})
        if errors:
            batch |= {"status": "failed", "failed_at": now()}
            batch["errors"] = {"object": "list", "data": errors}

    async def batch(self, request: web.Request) -> web.Response:
        batch = self.found(request, self.batches)
        states = ("validating", "in_progress", "finalizing")
        if batch["status"] == "cancelling":
            self.end(batch, "cancelled")
        elif batch["status"] in states:
            batch["polls"] += 1
            if batch["polls"] % self.faults.polls == 0:
                at = states.index(batch["status"])
                expires = (
                    draw(self.faults.seed, "expire", batch["number"]) < self.faults.batch_expire
                )
                if at < 2:
                    batch["status"] = states[at + 1]
                else:
                    self.end(batch, "expired" if expires else "completed")
        return web.json_response(batch)

    async def cancel_batch(self, request: web.Request) -> web.Response:
        batch = self.found(request, self.batches)
        batch["status"] = "cancelling"
        return web.json_response(batch)

    def end(self, batch: dict, status: str) -> None:
        """Answers the lines, all or one half, and stores output and errors."""
        lines = self.files[batch["input_file_id"]][1].decode().splitlines()
        items = [json.loads(line) for line in lines]
        items.sort(key=lambda item: draw(self.faults.seed, batch["number"], item["custom_id"]))
        outputs, errors = [], []
        for index, item in enumerate(items):
            line = {"id": self.new("req"), "custom_id": item["custom_id"], "error": None}
            caption = caption_of(item["body"])
            if status != "completed" and index >= len(items) // 2:
                error = {"code": "batch_expired", "message": "This request was not executed."}
                errors.append(line | {"response": None, "error": error})
            elif draw(self.faults.seed, "line", batch["number"], caption) < self.faults.batch_error:
                body = {"error": {"message": "The server had an error.", "code": "server_error"}}
                errors.append(line | {"response": {"status_code": 500, "body": body}})
            else:
                said = self.answered(caption, batch["id"], item["custom_id"])
                self.write(said)
                body = completion(said.id, item["body"]["model"], said.kind, said.content)
                outputs.append(line | {"response": {"status_code": 200, "body": body}})
        for name, kept in (("output", outputs), ("error", errors)):
            if kept:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                file = self.store(f"{batch['id']}_{name}.jsonl", text.encode(), "batch_output")
                batch[f"{name}_file_id"] = file["id"]
        counts = {"completed": len(outputs), "failed": len(errors)}
        batch["request_counts"] |= counts
        batch |= {"status": status, f"{status}_at": now()}

    # For the tests alone

    async def stats(self, _: web.Request) -> web.Response:
        counts = {"requests": self.requests, "faults": self.seen_faults, "peak": self.peak}
        names = {"files": list(self.files), "batches": self.batches, "jobs": self.jobs}
        return web.json_response(counts | names)

    async def change(self, request: web.Request) -> web.Response:
        self.faults = replace(self.faults, **await request.json())
        return web.json_response(asdict(self.faults))
