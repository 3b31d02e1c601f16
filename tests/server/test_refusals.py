"""What the server does not take: each refused with a status and a sentence, in OpenAI's form."""

import contextlib
import json
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AuthenticationError, BadRequestError, NotFoundError

from gemma_mtp import Model
from gemma_mtp.server.schema import ChatBody

from .conftest import KEY, OTHER_KEY, Server

COMPLETION = {"prompt": "Once"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"foo": 1}, "foo", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "valid integer"),
        ({"logit_bias": {"300000": 1}}, None, "outside the vocabulary"),
        ({"max_tokens": 0, "echo": True}, None, "set 'echo' and 'logprobs'"),
        ({"best_of": 2}, "best_of", "not valid"),
        ({"suffix": "end"}, "suffix", "not valid"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"max_tokens": 0}, None, "set 'echo' and 'logprobs'"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"stop": [""]}, None, "strings that are not empty"),
        ({"draft": "often"}, "draft", "'auto' or 'off'"),
        ({"draft": 1000}, None, "draft length is 1000"),
        ({"draft": "off", "speculative.n_max": 2}, None, "mean the same"),
        ({"stream_options": {"include_usage": True}}, None, "for streams"),
        ({"prompt": ""}, None, None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [2, 10**7]}, None, "outside the vocabulary"),
        ({"prompt": ["x"] * 3, "n": 3}, None, "9 texts at once: ask for at most 8"),
        ({"temperature": float("nan")}, "temperature", None),
        ({"prompt": "\ud800"}, None, None),
        ({"\ud800": 1}, None, "name of a parameter"),
    ],
    ids=str,
)
def test_a_bad_parameter_of_a_completion(demo_server: Server, more: dict, param: str | None, words: str | None) -> None:
    body = json.dumps(COMPLETION | {"max_tokens": 2} | more)  # as ASCII: lone surrogates stay escaped
    answer = demo_server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    if words is None:
        assert answer.status_code in (200, 400)  # an empty prompt is one for a model with a token for the beginning
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "role 'robot'"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the only one supported"),
        ({"messages": [{"role": "user", "content": "Hi", "audio": {"id": "a"}}]}, "'audio' are not supported"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}, "without the name"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "lone surrogate"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, ""),
        ({"top_logprobs": 2}, "without 'logprobs'"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"modalities": ["audio"]}, "'modalities' is not supported"),
        ({"reasoning_effort": "high"}, "'reasoning_effort' is not supported"),
        ({"chat_template_kwargs": {"other": 1}}, "not supported"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "cannot turn it on"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": float("nan")}}}]}, "not finite"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"x": "\ud800"}}}}, "lone"),
        ({"prediction": {"type": "words", "content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction.content"),
    ],
    ids=str,
)
def test_a_bad_parameter_of_a_chat(demo_server: Server, more: dict, words: str) -> None:
    body = json.dumps(CHAT | {"max_tokens": 2} | more)
    headers = {"Content-Type": "application/json"}
    status, error = demo_server.refusal("/v1/chat/completions", content=body, headers=headers)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert error["message"].endswith(".")


LARGE = {
    "completions": {
        "texts": ({"prompt": [""] * 100_000, "n": 16}, "1600000 texts at once: ask for at most"),
        "no texts": ({"prompt": [{}] * 100_000}, "valid string"),
        "a stop string": ({"stop": "x" * 1001}, "at most 1000 characters"),
        "one of the stop strings": ({"stop": ["a", "x" * 1001]}, "at most 1000 characters"),
        "stop strings": ({"stop": ["a"] * 17}, "at most 16 items"),
        "names": ({f"no{i}": 1 for i in range(70_000)}, "70002 keys"),
        "biases": ({"logit_bias": {f"a{i}": 1 for i in range(70_000)}}, "70000 keys"),
    },
    "chat/completions": {
        "messages": ({"messages": [3] * 100_000}, "messages.0"),
        "tools": ({"tools": [3] * 100_000}, "tools.0"),
    },
}


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, cases in LARGE.items() for name in cases])
def test_what_is_much_is_refused_soon(chat_server: Server, route: str, name: str) -> None:
    more, words = LARGE[route][name]
    body = json.dumps((COMPLETION if route == "completions" else CHAT) | {"max_tokens": 2} | more)
    start = time.monotonic()
    status, error = chat_server.refusal(
        f"/v1/{route}", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert time.monotonic() - start < 20  # not minutes, on a busy machine either


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b'{"prompt": "\xff"}', b"[" * 50_000, b"\x00\x01"], ids=repr
)
def test_a_body_that_is_not_a_json_object(demo_server: Server, content: bytes) -> None:
    for headers in ({"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}):
        status, error = demo_server.refusal("/v1/completions", content=content, headers=headers)
        assert status == 400, error
        assert error["message"]


def test_routes_and_models_that_there_are_not(demo_server: Server) -> None:
    with pytest.raises(NotFoundError, match="no model 'gpt'"):
        demo_server.client.completions.create(model="gpt", prompt="x")
    with pytest.raises(NotFoundError, match="no model 'gpt/4'"):
        demo_server.client.models.retrieve("gpt/4")
    assert demo_server.refusal("/v1/images")[0] == 404
    answer = demo_server.http.get("/v1/completions")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_key_is_needed(demo_server: Server) -> None:
    client = demo_server.client
    with pytest.raises(AuthenticationError, match="not one that this server knows"):
        client.with_options(api_key="sk-wrong").models.list()
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        for headers in ({}, {"Authorization": KEY}, {"Authorization": "Basic x"}, {"Authorization": "Bearer \xe9"}):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = httpx.get(demo_server.url + path, headers=encoded)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert httpx.get(f"{demo_server.url}/health").status_code == 200


def test_every_key_of_a_file_is_let_in(chat_server: Server) -> None:
    for key in (KEY, OTHER_KEY):
        assert chat_server.client.with_options(api_key=key).models.list().data
    with pytest.raises(AuthenticationError, match="not one that this server knows"):
        chat_server.client.with_options(api_key="# keys").models.list()


def test_a_large_body_is_refused(demo_server: Server) -> None:
    text = json.dumps({"prompt": "x" * 100_000}).encode()
    headers = {"Content-Type": "application/json"}
    assert demo_server.refusal("/v1/completions", content=text, headers=headers)[0] == 413
    chunked = (text[i : i + 1000] for i in range(0, len(text), 1000))  # without a Content-Length
    with contextlib.suppress(httpx.WriteError):  # the server may hang up before the client has sent all of it
        assert demo_server.refusal("/v1/completions", content=chunked, headers=headers)[0] == 413


def test_a_prompt_that_is_too_long_for_the_context(demo_server: Server, demo: Model) -> None:
    with pytest.raises(BadRequestError, match="more than the context") as refused:
        demo_server.client.completions.create(model="demo", prompt=[2] * (demo.context + 1))
    assert refused.value.code == "context_length_exceeded"


ODD = st.sampled_from(
    [None, True, False, 0, -1, 2, 3.5, 1e308, 2**64, float("nan"), "", "x", "auto", "off", "\ud800", [], {}, [[]], [{}],
     ["a"], [1, 2], [None], {"a": 1}, {"type": "text"}, [{"type": "function", "function": {"name": "f"}}],
     [{"type": "function", "function": {"name": 7}}], {"include_usage": True}, {"enable_thinking": True}]
)  # fmt: skip
PARAMETERS = sorted({field.alias or name for name, field in ChatBody.model_fields.items()} - {"messages"})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "robot"]), "content": st.just("Hi") | ODD},
    optional={"tool_calls": ODD, "tool_call_id": ODD, "name": ODD, "reasoning_content": ODD, "refusal": ODD},
)


@given(st.lists(MESSAGE, max_size=3) | ODD, st.dictionaries(st.sampled_from([*PARAMETERS, "other"]), ODD, max_size=3))
@settings(max_examples=300, deadline=None)
def test_whatever_is_asked_is_answered_or_refused(chat_server: Server, messages: object, more: dict) -> None:
    body = json.dumps({"messages": messages, "max_tokens": 3} | more)
    headers = {"Content-Type": "application/json"}
    answer = chat_server.http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif more.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["finish_reason"]
