"""Files of requests, in the form of OpenAI's batches, answered as the server answers them but without a network."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starlette.types import ASGIApp

from gemma_mtp.errors import SettingsError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_BUSY = (503, 529)
_RETRY = 0.05  # seconds


class Task(NamedTuple):
    """One request of a file."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_tasks(path: Path) -> list[Task]:
    """The requests of a file, one a line. Raises SettingsError, which names the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The requests of {path} cannot be read: {error}.") from None
    tasks: dict[str, Task] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(line)
            if task.custom_id in tasks:
                raise ValueError(f"the 'custom_id' {task.custom_id!r} is that of an earlier line")
        except (ValueError, RecursionError) as fault:
            raise SettingsError(f"Line {number} of {path} is no request: {fault}.") from None
        tasks[task.custom_id] = task
    if not tasks:
        raise SettingsError(f"{path} has no requests: give one JSON object a line.")
    return list(tasks.values())


def answered_before(part: Path, tasks: Sequence[Task]) -> list[int]:
    """The statuses of the answers that a run which was stopped has left: those of the first tasks. A line that was not
    written to its end is cut off. Raises SettingsError if they are of other tasks."""
    try:
        written = part.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        kept = [json.loads(line) for line in whole.splitlines()]
        fitting = [answer["custom_id"] for answer in kept] == [task.custom_id for task in tasks[: len(kept)]]
        statuses = [answer["response"]["status_code"] for answer in kept]
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise SettingsError(f"The answers of {part} cannot be read ({fault}): delete it to begin anew.") from None
    if not fitting:
        raise SettingsError(f"{part} has answers to other requests: delete it to begin anew.")
    if len(whole) < len(written):
        os.truncate(part, len(whole))
    return statuses


async def answers(app: ASGIApp, tasks: Sequence[Task], parallel: int) -> AsyncGenerator[dict[str, Any], None]:
    """The answer to each task, in their order, as a line of OpenAI's output file; `parallel` run at a time."""
    free = asyncio.Semaphore(parallel)

    async def answer(task: Task) -> dict[str, Any]:
        async with free:
            return await _answer(app, task)

    running = [asyncio.ensure_future(answer(task)) for task in tasks]
    try:
        for one in running:
            yield await one
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _task(line: str) -> Task:
    """Raises ValueError with half a sentence."""
    try:
        given = json.loads(line)
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(given, dict):
        raise ValueError("it is not an object")
    custom_id, method, url, body = (given.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("it has no 'custom_id', which is a text")
    if method != "POST":
        raise ValueError("its 'method' is not POST")
    if url not in URLS:
        raise ValueError(f"its 'url' is none of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError("it has no 'body', which is an object")
    if body.get("stream"):
        raise ValueError("its 'body' asks for a stream, which a file cannot hold")
    return Task(custom_id, url, body)


async def _answer(app: ASGIApp, task: Task) -> dict[str, Any]:
    content = json.dumps(task.body).encode()
    status, request_id, body = await _post(app, task.url, content)
    while status in _BUSY:  # requests of several texts each can fill the queue
        await asyncio.sleep(_RETRY)
        status, request_id, body = await _post(app, task.url, content)
    response = {"status_code": status, "request_id": request_id, "body": json.loads(body)}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": task.custom_id,
        "response": response,
        "error": None,
    }


async def _post(app: ASGIApp, url: str, content: bytes) -> tuple[int, str, bytes]:
    """The status of an answer, its X-Request-Id (empty: it has none), and its body."""
    waiting = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not waiting:
            await asyncio.Event().wait()  # this client never leaves
        return waiting.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
    }
    try:
        await app(scope, receive, send)
    except Exception:
        if not sent:  # otherwise it was answered with a 500, and is raised again for a server's log
            raise
    start, *parts = sent
    named = dict(start["headers"])
    return start["status"], named.get(b"x-request-id", b"").decode(), b"".join(part.get("body", b"") for part in parts)
