"""What clients see of the prefix cache, of little memory and of time limits."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import APIStatusError, BadRequestError

from gemma_mtp import Model, SamplingParams
from gemma_mtp.prompts import NINE_KINDS

from .conftest import Server

LONG = "\n\n".join(NINE_KINDS.values())[:1200]  # about 330 tokens


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Memory for little more than one context, and four sequences that want to run."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--parallel", 4, "--ctx", 512, "--kv-memory", "10MiB", "--max-prompt", 450)
    server = Server(log, "demo", *options)
    yield server
    server.stop()
    assert "Traceback" not in server.log


def test_cached_tokens_are_told(small: Server, demo: Model) -> None:
    hits, queries = small.metric("prefix_cache_hits_total"), small.metric("prefix_cache_queries_total")
    ask = {"model": "demo", "prompt": LONG, "max_tokens": 8, "temperature": 0}
    expected = demo.generate(LONG, SamplingParams(max_tokens=8))
    cached = []
    for _ in range(2):
        answer = small.client.completions.create(**ask)
        assert answer.choices[0].text == expected.text
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
        assert answer.timings["cache_n"] == cached[-1]
    assert cached == [0, (expected.stats.prompt_tokens - 1) // 64 * 64]
    assert small.metric("prefix_cache_hits_total") - hits == cached[1]
    assert small.metric("prefix_cache_queries_total") - queries == 2 * expected.stats.prompt_tokens
    assert 0 < small.metric("kv_cache_bytes") <= 10 << 20
    assert small.metric("kv_cache_usage_perc") == 0

    body = {"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": LONG}]}
    first, second = (small.http.post("/v1/messages", json=body).json()["usage"] for _ in range(2))
    assert second["cache_read_input_tokens"] > first["cache_read_input_tokens"]
    assert sum(second.values()) == sum(first.values())


def test_preemption_changes_no_text(small: Server, demo: Model) -> None:
    prompts = [f"{i}. {LONG[: 180 + 10 * i]}" for i in range(4)]
    ask = {"model": "demo", "max_tokens": 110, "temperature": 1.0, "seed": 3, "extra_body": {"ignore_eos": True}}

    def text(prompt: str) -> str:
        return small.client.completions.create(prompt=prompt, **ask).choices[0].text

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(text, prompts))
    params = SamplingParams(max_tokens=110, temperature=1.0, seed=3, ignore_eos=True)
    assert texts == [demo.generate(prompt, params, "off").text for prompt in prompts]
    assert small.metric("num_preemptions_total") > 0


def test_a_prompt_longer_than_the_server_takes_is_refused(small: Server) -> None:
    with pytest.raises(BadRequestError, match="more than the 450 that this server takes") as caught:
        small.client.completions.create(model="demo", prompt=[2] * 451)
    assert caught.value.code == "context_length_exceeded"


def test_a_request_that_takes_too_long_is_ended(tmp_path) -> None:
    server = Server(tmp_path / "log", "demo", "--timeout", 1)
    ask = {"model": "demo", "prompt": "Once", "max_tokens": 8000, "extra_body": {"ignore_eos": True}}
    try:
        with pytest.raises(APIStatusError, match="longer than this server lets") as caught:
            server.client.completions.create(**ask)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        with pytest.raises(Exception, match="longer than this server lets"):
            list(server.client.completions.create(**ask, stream=True))
        assert server.http.get("/health").json()["running"] == 0
    finally:
        server.stop()


@pytest.mark.parametrize("size", ["1KiB", "lots"])
def test_a_memory_that_cannot_be_is_refused(tmp_path, size: str) -> None:
    with pytest.raises(AssertionError, match=r"memory for keys and values|is no size"):
        Server(tmp_path / "log", "demo", "--kv-memory", size)
