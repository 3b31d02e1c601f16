"""Many clients at once, clients that leave, and a server that is told to stop."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APITimeoutError, InternalServerError

from gemma_mtp import Model, SamplingParams
from gemma_mtp.prompts import NINE_KINDS

from .conftest import Server

ENDLESS = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def idle(server: Server) -> bool:
    return server.http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_answers_do_not_depend_on_other_clients(demo_server: Server, demo: Model) -> None:
    prompts = list(NINE_KINDS.values())[:8]
    settings = [{"temperature": 0}, {"temperature": 1.0, "top_k": 64, "seed": 4}] * 4

    def ask(i: int) -> str:
        return demo_server.client.completions.create(
            model="demo",
            prompt=prompts[i],
            max_tokens=10,
            extra_body=settings[i],
        ).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    for prompt, setting, text in zip(prompts, settings, texts, strict=True):
        assert text == demo.generate(prompt, SamplingParams(max_tokens=10, **setting), "off").text


def test_a_client_that_leaves_frees_its_place_at_once(demo_server: Server) -> None:
    tokens = demo_server.metric("generation_tokens_total")
    stream = demo_server.client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: idle(demo_server))

    with pytest.raises(APITimeoutError):
        demo_server.client.with_options(timeout=1.0).completions.create(**ENDLESS, n=3)
    wait_until(lambda: idle(demo_server))
    assert demo_server.metric("generation_tokens_total") - tokens < 2000


def test_a_full_queue_is_said_so_with_503(demo_server: Server) -> None:
    streams = [demo_server.client.completions.create(**ENDLESS, stream=True, n=4) for _ in range(2)]
    with pytest.raises(InternalServerError, match="8 requests are running or waiting") as refused:
        demo_server.client.completions.create(model="demo", prompt="x")
    assert refused.value.status_code == 503
    assert refused.value.response.headers["Retry-After"] == "1"
    for stream in streams:
        stream.close()
    wait_until(lambda: idle(demo_server))


@pytest.fixture
def server(tmp_path: Path):
    server = Server(tmp_path / "log", "demo", "--parallel", 1)
    yield server
    server.kill()


def test_sigterm_drains(server: Server, demo: Model) -> None:
    expected = demo.generate("Once upon a time", SamplingParams(max_tokens=40)).text
    ask = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    stream = iter(server.client.completions.create(**ask, stream=True))
    text = next(stream).choices[0].text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.completions.create, **ask)  # has no place yet
        wait_until(lambda: server.http.get("/health").json()["waiting"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
        assert waiting.result().choices[0].text == expected
    assert server.process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log
