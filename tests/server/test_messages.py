"""Anthropic's /v1/messages, over plain HTTP: blocks, events, and errors in its own form."""

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp import Model, SamplingParams
from gemma_mtp.server.messages import MessagesBody

from ..scripted import ANSWER, CALL, REASONING
from .conftest import KEY, Server
from .test_refusals import ODD

QUESTION = [{"role": "user", "content": "Say it."}]
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
ASK = {"model": "scripted", "messages": QUESTION, "max_tokens": 64, "temperature": 0}


def create(server: Server, **body: object) -> dict:
    answer = server.http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(server: Server, **body: object) -> list[dict]:
    answer = server.http.post("/v1/messages", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parsed = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def joined(stream: list[dict]) -> list[dict]:
    """The blocks that the events of a stream make, each begun, filled and ended in order."""
    blocks: list[dict] = []
    open_block, arguments = False, ""
    for event in stream:
        if event["type"] == "content_block_start":
            assert not open_block
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            open_block, arguments = True, ""
        elif event["type"] == "content_block_delta":
            assert open_block
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                kind = delta["type"].removesuffix("_delta")
                blocks[-1][kind] += delta[kind]
        elif event["type"] == "content_block_stop":
            if arguments:
                blocks[-1]["input"] = json.loads(arguments)
            open_block = False
    assert not open_block
    return blocks


def prompt_tokens(usage: dict) -> int:
    return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


def without_ids(blocks: list[dict]) -> list[dict]:
    return [{name: value for name, value in block.items() if name != "id"} for block in blocks]


def test_thinking_text_and_tool_use_are_blocks(chat_server: Server) -> None:
    ask = {**ASK, "tools": TOOLS, "thinking": {"type": "adaptive"}}
    message = create(chat_server, **ask)
    expected = [
        {"type": "thinking", "thinking": REASONING, "signature": ""},
        {"type": "text", "text": ANSWER},
        {"type": "tool_use", "name": CALL["name"], "input": CALL["arguments"]},
    ]
    assert without_ids(message["content"]) == expected
    assert message["content"][2]["id"].startswith("toolu_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "scripted")
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    counted = chat_server.http.post(
        "/v1/messages/count_tokens", json={name: ask[name] for name in ("messages", "tools", "thinking")}
    )
    assert counted.json() == {"input_tokens": prompt_tokens(message["usage"])}

    stream = events(chat_server, **ask)
    assert without_ids(joined(stream)) == expected
    opening, ending, end = stream[0], *stream[-2:]
    assert opening["type"] == "message_start"
    assert (opening["message"]["content"], opening["message"]["stop_reason"]) == ([], None)
    assert prompt_tokens(opening["message"]["usage"]) == prompt_tokens(message["usage"])
    assert ending["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert ending["usage"]["output_tokens"] == message["usage"]["output_tokens"]
    assert end == {"type": "message_stop"}


def test_a_tools_result_goes_back(chat_server: Server) -> None:
    first = create(chat_server, **ASK, tools=TOOLS)
    call = first["content"][-1]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "3"}]}
    said = [block | {"citations": None, "caller": None} for block in first["content"]]  # as the client dumps them
    turns = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    again = create(chat_server, **ASK | {"messages": turns}, tools=TOOLS)
    assert again["content"][0] == {"type": "text", "text": ANSWER}
    assert prompt_tokens(again["usage"]) > prompt_tokens(first["usage"])


@pytest.mark.parametrize(
    ("more", "text", "reason", "sequence"),
    [
        ({"stop_sequences": ["never", " you"]}, "Hello there", "stop_sequence", " you"),
        ({"max_tokens": 2}, "Hello there", "max_tokens", None),
    ],
    ids=["stop sequence", "max_tokens"],
)
def test_how_an_answer_ended(
    chat_server: Server, more: dict, text: str, reason: str, sequence: str | None
) -> None:
    message = create(chat_server, **ASK | more)
    assert message["content"] == [{"type": "text", "text": text}]
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    stream = events(chat_server, **ASK | more)
    assert joined(stream) == message["content"]
    assert stream[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_the_answer_is_the_models_and_does_not_depend_on_drafting(demo_server: Server, demo: Model) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 3}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, hi, hi"}]
    expected = demo.generate(turns, SamplingParams(max_tokens=24, **sampled), "off")  # type: ignore[arg-type]
    for draft in ("auto", "off", 4):
        message = create(
            demo_server,
            model="demo",
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi, hi, hi"}]}],
            max_tokens=24,
            draft=draft,
            **sampled,
        )
        assert "".join(block["text"] for block in message["content"]) == expected.text
        assert prompt_tokens(message["usage"]) == expected.stats.prompt_tokens
        assert message["usage"]["output_tokens"] == len(expected.tokens)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"foo": 1}, "'foo' is not supported"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Well"}]}, "end with the user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "no place for a block"),
        ({"system": [{"type": "text", "text": "x", "citations": [{}]}]}, "'citations' are not supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "calls cannot be enforced"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'adaptive'"),
        ({"stop_sequences": [""]}, "strings that are not empty"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_refused_in_anthropics_form(chat_server: Server, more: dict, words: str) -> None:
    answer = chat_server.http.post("/v1/messages", json=ASK | more)
    content = answer.json()
    assert (answer.status_code, content["type"], content["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in content["error"]["message"]
    assert content["error"]["message"].endswith(".")


def test_keys_and_models_and_methods(chat_server: Server) -> None:
    def kind(**request: object) -> tuple[int, str]:
        answer = httpx.post(f"{chat_server.url}/v1/messages", **request)  # type: ignore[arg-type]
        return answer.status_code, answer.json()["error"]["type"]

    assert httpx.post(f"{chat_server.url}/v1/messages", json=ASK, headers={"x-api-key": KEY}).status_code == 200
    assert kind(json=ASK) == kind(json=ASK, headers={"x-api-key": "no"}) == (401, "authentication_error")
    assert kind(json=ASK | {"model": "claude"}, headers={"x-api-key": KEY}) == (404, "not_found_error")
    assert chat_server.http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"


BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
    optional=dict.fromkeys(("text", "id", "name", "input", "tool_use_id", "content", "thinking", "is_error"), ODD),
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.lists(BLOCK) | ODD})
PARAMETERS = sorted(set(MessagesBody.model_fields) - {"messages"})


@given(st.lists(MESSAGE, max_size=3) | ODD, st.dictionaries(st.sampled_from([*PARAMETERS, "other"]), ODD, max_size=3))
@settings(max_examples=100, deadline=None)
def test_whatever_is_asked_is_answered_or_refused(chat_server: Server, messages: object, more: dict) -> None:
    turns = [*messages, *QUESTION] if isinstance(messages, list) else messages
    body = json.dumps({"messages": turns, "max_tokens": 3} | more)
    headers = {"Content-Type": "application/json"}
    answer = chat_server.http.post("/v1/messages", content=body, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif more.get("stream"):
        assert answer.text.endswith('data: {"type": "message_stop"}\n\n')
    else:
        assert answer.json()["stop_reason"]
