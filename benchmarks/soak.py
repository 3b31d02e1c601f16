"""A server under clients of every kind for a while: does it stay up, answer or refuse each, and keep its memory?

    python benchmarks/soak.py [--minutes N] [--clients N] [--model FILE] [--seed N] [--json OUT]

Clients stream and wait, leave in the middle, read slowly, and send garbage, broken JSON, malformed Unicode, bodies that
are too large and fields that are not valid. At the end requests are running when SIGTERM comes. Checked are:

answers   each request that is valid is answered in full, and always with the same text; each other one is refused with
          the status and the error object that it should have; while the server is full, 503 is an answer too
errors    no other 5xx, no traceback in the log, nothing left running once all clients are gone
memory    the server's own memory (RssAnon) at the end is within 5 % of that after the first fifth of the time; judged
          from 5 minutes on. Before, the largest requests come, for which memory is taken as it is needed, and so many
          that the cache of prefixes is as large as it may be
the end   what runs at SIGTERM is answered, and the server ends in time

Linux only, for the memory. Exit status 1 says that something failed.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from peers import OURS

PARALLEL = 3
MAX_BODY = 100_000  # bytes
LONG = 400  # tokens of answers that clients leave
PATIENCE = 180  # seconds that any answer may take
DRAIN = 60  # seconds
TEXTS = (
    "The capital of France is",
    "Once upon a time",
    "def add(a, b):\n    return",
    "Grüße aus Köln! 😀 はい",
    "1, 2, 3,",
)
CHAT = [{"role": "user", "content": "Tell me a story."}]

# Bodies of /v1/completions (or /v1/chat/completions, where they have messages) that are to be refused with 400.
INVALID: list[Any] = [
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": "x", "temperature": float("inf")},
    {"prompt": "x", "top_p": 7},
    {"prompt": "x", "n": 1000},
    {"prompt": "x", "stop": [""] * 99},
    {"prompt": "x", "no_such_field": 1},
    {"prompt": "x", "draft": "often"},
    {"prompt": "x", "logit_bias": {"0": 1e9}},
    {"prompt": "x", "\ud800": 1},
    {"prompt": "a lone surrogate: \ud800"},
    {"prompt": ["x", "\udfff"]},
    {"prompt": [10**12]},
    {"prompt": [-1]},
    {"prompt": []},
    {"prompt": {"a": [[]]}},
    {"prompt": "one word and " * 2000},  # too long for the context
    {"messages": []},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
    {"messages": CHAT, "response_format": {"type": "no such form"}},
    {"messages": CHAT, "tools": [{"type": "function"}]},
    {"messages": CHAT, "tool_choice": "sometimes"},
    {"messages": CHAT, "grammar": "start: ((("},
    [],
    "x",
    None,
]
GARBAGE = [
    b"\x00\xff\xfe" * 50 + b"\r\n\r\n",
    b"GET / HTTP/one\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: twelve\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"A" * 70_000,
]
BROKEN = [
    b'{"prompt": "x"',
    b'{"prompt": "\xff\xfe\xed\xa0\x80"}',
    b"[" * 50_000,
    b"\x00",
    b"",
    b'{"prompt": "\\ud83d"}',
]


class Failed(Exception):
    """The server did what it must not."""


class Soak:
    def __init__(self, url: str, seed: int):
        self.url, self.random = url, random.Random(seed)
        self.port = int(url.rsplit(":", 1)[1])
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=100))
        self.texts: dict[str, str] = {}  # the answer to each request that was answered
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.over = False

    async def client(self) -> None:
        """One visit after the other, until it is over."""
        visits: list[Callable[[], Awaitable[str]]] = [
            *(self.wait, self.stream, self.stream, self.leave, self.leave, self.leave_before, self.read_slowly),
            *(
                self.send_invalid,
                self.send_broken,
                self.send_garbage,
                self.send_too_much,
                self.send_half,
                self.ask_around,
            ),
        ]
        while not self.over:
            visit = self.random.choice(visits)
            try:
                outcome = await asyncio.wait_for(visit(), PATIENCE)
            except Failed as failure:
                self.failures.append(f"{visit.__name__}: {failure}")
            except (TimeoutError, httpx.HTTPError) as error:
                self.failures.append(f"{visit.__name__}: {type(error).__name__} {error}")
            else:
                self.outcomes[f"{visit.__name__}: {outcome}"] += 1

    async def fill(self) -> None:
        """The most that the server can have to hold at once: all sequences at their longest, all logits of a pass of as
        many sampled rows as there may be, as the prompt's log probabilities have, and a full cache of prefixes. It
        keeps that memory for later.
        """
        most = {"max_tokens": LONG, "logprobs": 2, "echo": True, "ignore_eos": True}
        cached, number = -1.0, 0
        while cached < (cached := await self.cached()):
            texts = [f"{number + i}. {max(TEXTS, key=len) * 20}" for i in range(PARALLEL)]
            bodies = [most | {"prompt": text} for text in texts]
            for response in await asyncio.gather(*(self.http.post("/v1/completions", json=body) for body in bodies)):
                response.raise_for_status()
            number += PARALLEL

    async def cached(self) -> float:
        """Of the server's memory what the KV cache takes, in MB; 0 from a server that has ended, as of `megabytes`."""
        try:
            metrics = (await self.http.get("/metrics")).text
        except httpx.HTTPError:
            return 0.0
        found = re.search(r"^gemma_mtp:kv_cache_bytes (\S+)", metrics, re.MULTILINE)
        if not found:
            raise Failed("The metrics do not say how large the KV cache is.")
        return float(found[1]) / 1e6

    async def wait(self) -> str:
        path, body = self.valid()
        response = await self.http.post(path, json=body)
        if response.status_code == 503:
            return refused(response, 503)
        if response.status_code != 200:
            raise Failed(f"{body} was answered with {response.status_code}: {response.text[:300]}")
        choices = response.json()["choices"]
        return self.answered(body, [choice.get("text") or choice["message"]["content"] for choice in choices])

    async def stream(self, pause: float = 0.0) -> str:
        path, body = self.valid()
        texts, done = [""] * body["n"], False
        async with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                return refused(response, 503)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Failed(f"A stream broke off: {event['error']}")
                    for choice in event["choices"]:
                        texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                if pause:
                    await asyncio.sleep(pause)
        if not done:
            raise Failed("A stream ended without [DONE].")
        return self.answered(body, texts)

    async def read_slowly(self) -> str:
        return await self.stream(pause=0.1)

    async def leave(self) -> str:
        path, body = self.valid()
        events = self.random.randrange(4)
        async with self.http.stream("POST", path, json=body | {"stream": True, "max_tokens": LONG}) as response:
            if response.status_code != 200:
                await response.aread()
                return refused(response, 503)
            async for _ in response.aiter_lines():
                events -= 1
                if events < 0:
                    break
        return "left"

    async def leave_before(self) -> str:
        """A whole request, and the connection is closed before its answer comes."""
        path, body = self.valid()
        content = json.dumps(body | {"max_tokens": LONG}).encode()
        await self.raw(head(path, len(content)) + content, read=False, after=self.random.random())
        return "left"

    async def send_half(self) -> str:
        content = b'{"prompt": "' + b"x" * 1000
        await self.raw(head("/v1/completions", len(content) + 500) + content, read=False, after=self.random.random())
        return "left"

    async def send_invalid(self) -> str:
        body = self.random.choice(INVALID)
        path = "/v1/chat/completions" if isinstance(body, dict) and "messages" in body else "/v1/completions"
        headers = {"Content-Type": "application/json"}
        return refused(await self.http.post(path, content=json.dumps(body), headers=headers), 400)

    async def send_broken(self) -> str:
        headers = {"Content-Type": self.random.choice(["application/json", "text/plain", ""])}
        body = self.random.choice(BROKEN)
        return refused(await self.http.post("/v1/completions", content=body, headers=headers), 400)

    async def send_too_much(self) -> str:
        """More than the server takes: said beforehand, or in chunks that do not say how much is to come."""
        if self.random.random() < 0.5:
            answer = await self.raw(head("/v1/completions", MAX_BODY + 1), read=True)
        else:
            chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
            start = head("/v1/completions", None)
            answer = await self.raw(start + chunk * (MAX_BODY // 0x8000 + 1), read=True)
        if not answer.startswith(b"HTTP/1.1 413 "):
            raise Failed(f"A body that is too large was answered with {answer[:200]!r}")
        return "refused, 413"

    async def send_garbage(self) -> str:
        answer = await self.raw(self.random.choice(GARBAGE), read=True)
        if answer and not re.match(rb"HTTP/1.1 4\d\d ", answer):
            raise Failed(f"Garbage was answered with {answer[:200]!r}")
        return "refused"

    async def ask_around(self) -> str:
        path = self.random.choice(
            ["/", "/health", "/metrics", "/v1/models", "/nothing/here", "/v1/completions", "/%00%ff"]
        )
        response = await self.http.get(path)
        expected = {"/nothing/here": 404, "/v1/completions": 405, "/%00%ff": 404}.get(path, 200)
        if response.status_code != expected:
            raise Failed(f"{path} was answered with {response.status_code}")
        return "answered"

    def valid(self) -> tuple[str, dict[str, Any]]:
        pick = self.random.choice
        text, tokens = pick(TEXTS), pick((1, 8, 32, 64))
        body = {"max_tokens": tokens, "n": pick((1, 1, 1, 2)), "seed": pick((1, 2)), "temperature": pick((0, 1))}
        if pick((False, True)):
            body |= pick(({}, {"stop": ["\n"]}, {"top_k": 40}, {"frequency_penalty": 1.0}, {"logprobs": 2}))
            return "/v1/completions", body | {"prompt": text * pick((1, 1, 20)), "draft": pick(("auto", "off", 4))}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}

    def answered(self, body: dict[str, Any], texts: list[str]) -> str:
        """Checks that the same was answered whenever the same was asked, drafting aside."""
        asked = json.dumps({key: value for key, value in body.items() if key not in ("draft", "stream")})
        text = json.dumps(texts)
        if self.texts.setdefault(asked, text) != text:
            raise Failed(f"{asked} was answered with {text}, and before with {self.texts[asked]}")
        return "answered"

    async def raw(self, content: bytes, *, read: bool, after: float = 0.0) -> bytes:
        """Sends bytes; the first part of the answer, or b"" where the server hung up, or waits for the rest.

        after: seconds until it is read, or the connection closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(content)
            await writer.drain()
            await asyncio.sleep(after)
            return await asyncio.wait_for(reader.read(4096), 10) if read else b""
        except (ConnectionError, TimeoutError):
            return b""
        finally:
            writer.close()


def head(path: str, length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode()


def refused(response: httpx.Response, status: int) -> str:
    """Checks that an answer is that refusal, with an error object that says why."""
    if response.status_code not in (status, 503):
        asked = response.request.content[:200]
        raise Failed(f"{asked!r} was answered with {response.status_code}, not {status}: {response.text[:300]}")
    error = response.json()["error"]
    if not error["message"] or not error["type"]:
        raise Failed(f"An error does not say what is wrong: {response.text}")
    return f"refused, {response.status_code}"


async def main() -> None:
    parser = argparse.ArgumentParser(description="A server under clients of every kind for a while.")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to a file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        limits = ["--parallel", str(PARALLEL), "--max-queue", "6", "--max-body", str(MAX_BODY), "--drain", str(DRAIN)]
        with log.open("w") as out:
            command = [*OURS, "serve", "-m", args.model, "-t", str(args.threads), "-c", "2048", *limits, "--port", "0"]
            process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            result = await watch(args, process, log)
        finally:
            if process.returncode is None:
                process.kill()
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["failures"] else 0)


async def watch(args: argparse.Namespace, process: asyncio.subprocess.Process, log: Path) -> dict[str, Any]:
    """Runs the clients beside a server and says what became of it."""
    soak = Soak(await address(process, log), args.seed)
    await soak.fill()
    clients = [asyncio.ensure_future(soak.client()) for _ in range(args.clients)]
    memory: list[float] = []
    end, every = time.monotonic() + 60 * args.minutes, min(5.0, 60 * args.minutes / 30)
    while time.monotonic() < end and process.returncode is None:
        await asyncio.sleep(every)
        memory.append(megabytes(process.pid))
        cached, visits = await soak.cached(), sum(soak.outcomes.values())
        print(f"{memory[-1]:.1f} MB, of which the KV cache {cached:.1f}, {visits} visits", file=sys.stderr)
    soak.over = True
    await asyncio.gather(*clients)
    if process.returncode is None:
        await until_idle(soak)
        await stop(soak, process)
    if process.returncode not in (0, -signal.SIGTERM):
        soak.failures.append(f"The server ended with status {process.returncode}: {log.read_text()[-2000:]}")
    if "Traceback" in log.read_text():
        soak.failures.append(f"The log has a traceback: {log.read_text()[-4000:]}")
    fifth = max(len(memory) // 5, 1)
    settled, last = statistics.median(memory[fifth : 2 * fifth] or memory), statistics.median(memory[-fifth:])
    if args.minutes >= 5 and last > 1.05 * settled:
        soak.failures.append(f"The memory grew from {settled:.1f} to {last:.1f} MB.")
    return {
        "minutes": args.minutes,
        "visits": sum(soak.outcomes.values()),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "different requests": len(soak.texts),
        "memory MB": {"settled": settled, "end": last, "most": max(memory)},
        "failures": soak.failures,
    }


async def address(process: asyncio.subprocess.Process, log: Path) -> str:
    while not (found := re.search(r"running on (http://\S+)", log.read_text())):
        if process.returncode is not None:
            sys.exit(f"The server did not start: {log.read_text()}")
        await asyncio.sleep(0.1)
    return found[1]


async def until_idle(soak: Soak) -> None:
    """Waits until nothing runs any more, now that all clients are gone."""
    deadline = time.monotonic() + 20
    while (health := (await soak.http.get("/health")).json()) != {"status": "ok", "running": 0, "waiting": 0}:
        if time.monotonic() > deadline:
            soak.failures.append(f"All clients are gone, but the server says {health}.")
            return
        await asyncio.sleep(0.1)


async def stop(soak: Soak, process: asyncio.subprocess.Process) -> None:
    """SIGTERM while requests run and wait: all of them are to be answered."""
    running = [asyncio.ensure_future(visit()) for visit in [soak.stream, soak.wait] * 3]
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(outcome, BaseException):
            soak.failures.append(f"At SIGTERM: {type(outcome).__name__} {outcome}")
        else:
            soak.outcomes[f"at SIGTERM: {outcome}"] += 1
    try:
        await asyncio.wait_for(process.wait(), DRAIN)
    except TimeoutError:
        soak.failures.append(f"The server had not ended {DRAIN} seconds after SIGTERM.")


def megabytes(pid: int) -> float:
    """Memory of a process that no file is behind, in MB."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    asyncio.run(main())
