"""Structured output and forced calls through OpenAI's and Anthropic's forms, on real servers."""

import json
import re

import pytest
from openai import BadRequestError

from .conftest import Server

QUESTION = [{"role": "user", "content": "Say it."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Berlin"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city", "age"],
    "additionalProperties": False,
}
UNITS = {"type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": UNITS}} for name in ("weather", "oven")
]


def chat(server: Server, **more: object):
    ask = {"model": "demo", "messages": QUESTION, "max_tokens": 40, "seed": 3}
    return server.client.chat.completions.create(**ask | more)  # type: ignore[call-overload]


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema_in_a_chat_drafted_or_not_streamed_or_not(demo_server: Server, temperature: float) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA, "strict": True}}
    texts = set()
    for draft in ("auto", "off", 4):
        ask = {"response_format": shape, "temperature": temperature, "extra_body": {"draft": draft}}
        choice = chat(demo_server, **ask).choices[0]
        assert choice.finish_reason == "stop"
        texts.add(choice.message.content)
        texts.add("".join(chunk.choices[0].delta.content or "" for chunk in chat(demo_server, **ask, stream=True)))
    (text,) = texts
    answer = json.loads(text)
    assert answer["city"] in ("Paris", "Berlin")
    assert 1 <= answer["age"] <= 99


def test_every_way_to_say_it(demo_server: Server) -> None:
    answer = chat(demo_server, response_format={"type": "json_object"}).choices[0].message.content
    assert isinstance(json.loads(answer), dict)
    assert chat(demo_server, response_format={"type": "text"}).choices[0].message.content
    ways = {
        "json": (SCHEMA, r"(?s)\{.*\}"),
        "regex": (r"[A-Z][a-z]{2,5}!", r"[A-Z][a-z]{2,5}!"),
        "choice": (["one", "two"], "one|two"),
        "grammar": ('start: "<" /[a-z]{1,4}/ ">"', "<[a-z]{1,4}>"),
    }
    for name, (value, pattern) in ways.items():
        more = {"structured_outputs": {name: value}}
        ask = {"model": "demo", "prompt": "It is", "max_tokens": 40, "seed": 1, "n": 2, "extra_body": more}
        for choice in demo_server.client.completions.create(**ask).choices:  # type: ignore[call-overload]
            assert re.fullmatch(pattern, choice.text), (name, choice.text)
        assert re.fullmatch(pattern, chat(demo_server, extra_body=more).choices[0].message.content), name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "'response_format.json_schema.json_schema' is missing"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "needs one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "needs one of"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "\ud800"}}, ""),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "unknown name"),
        ({"structured_outputs": {"grammar": "start: " + "(" * 5000}}, "nested"),
        ({"structured_outputs": {"json": {"type": 7}}}, "The grammar cannot be used"),
        ({"structured_outputs": {"json": {"$ref": "#/x"}}}, "The grammar cannot be used"),
        ({"structured_outputs": {"choice": [""]}}, "none that is empty"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "give one"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused_in_a_sentence(demo_server: Server, more: dict, words: str) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 2} | more)
    headers = {"Content-Type": "application/json"}
    status, error = demo_server.refusal("/v1/chat/completions", content=body, headers=headers)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_a_call_can_be_forced(chat_server: Server, draft: str) -> None:
    ask = {"model": "scripted", "tools": TOOLS, "temperature": 0, "extra_body": {"draft": draft}}
    one = {"type": "function", "function": {"name": "oven"}}
    for choice, names in ((one, {"oven"}), ("required", {"oven", "weather"})):
        for stream in (False, True):
            answer = chat(chat_server, **ask, tool_choice=choice, parallel_tool_calls=False, stream=stream)
            if stream:
                chunks = [chunk.choices[0] for chunk in answer]
                calls, reason = [c for chunk in chunks for c in chunk.delta.tool_calls or []], chunks[-1].finish_reason
                assert not any(chunk.delta.content for chunk in chunks)
            else:
                calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
                assert answer.choices[0].message.content is None
            (call,) = calls
            assert call.function.name in names
            assert json.loads(call.function.arguments)["unit"] in ("c", "f")
            assert reason == "tool_calls"


def test_a_call_that_cannot_be_forced_is_refused(chat_server: Server, demo_server: Server) -> None:
    unknown = {"type": "function", "function": {"name": "fridge"}}
    for more, words in (
        ({"tool_choice": "required"}, "no tools are declared"),
        ({"tools": TOOLS, "tool_choice": unknown}, "nor one of the tools"),
    ):
        with pytest.raises(BadRequestError, match=words):
            chat(chat_server, model="scripted", **more)
    with pytest.raises(BadRequestError, match="no place for them"):
        chat(demo_server, tools=TOOLS, tool_choice="required")


def test_anthropics_form_forces_calls_too(chat_server: Server) -> None:
    tools = [{"name": tool["function"]["name"], "input_schema": UNITS} for tool in TOOLS]
    for choice, names in (({"type": "tool", "name": "oven"}, ["oven"]), ({"type": "any"}, ["oven", "weather"])):
        choice = choice | {"disable_parallel_tool_use": True}
        body = {"messages": QUESTION, "max_tokens": 60, "tools": tools, "tool_choice": choice, "temperature": 0}
        answer = chat_server.http.post("/v1/messages", json=body).json()
        (block,) = answer["content"]
        assert (block["type"], answer["stop_reason"]) == ("tool_use", "tool_use")
        assert block["name"] in names
        assert block["input"]["unit"] in ("c", "f")
