"""OpenAI's Responses through its own client."""

import json
from typing import Literal

import pytest
from openai import BadRequestError
from pydantic import BaseModel

from ..scripted import ANSWER, CALL, REASONING
from .conftest import Server

TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object"}}]


def test_reasoning_a_message_and_a_call_are_items(chat_server: Server) -> None:
    ask = {"model": "scripted", "input": "Say it.", "tools": TOOLS, "temperature": 0, "reasoning": {"effort": "low"}}
    whole = chat_server.client.responses.create(**ask)  # type: ignore[call-overload]
    assert (whole.object, whole.status, whole.error, whole.output_text) == ("response", "completed", None, ANSWER)
    reasoning, message, call = whole.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", REASONING)
    assert (message.role, message.status, message.content[0].annotations) == ("assistant", "completed", [])
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", CALL["arguments"])
    assert call.call_id
    usage = whole.usage
    assert usage.output_tokens_details.reasoning_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens

    events = list(chat_server.client.responses.create(**ask, stream=True))  # type: ignore[call-overload]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.type for event in events].count("response.output_item.added") == 3
    deltas: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            deltas[event.type] = deltas.get(event.type, "") + event.delta
    assert deltas["response.reasoning_text.delta"] == REASONING
    assert deltas["response.output_text.delta"] == ANSWER
    assert json.loads(deltas["response.function_call_arguments.delta"]) == CALL["arguments"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.model_dump() for item in last.response.output] == [item.model_dump() for item in done]
    assert [item.type for item in done] == [item.type for item in whole.output]
    assert last.response.usage == usage


def test_the_clients_own_accumulation_of_a_stream(chat_server: Server) -> None:
    with chat_server.client.responses.stream(model="scripted", input="Say it.", temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == ANSWER


def test_items_go_back_with_the_results_of_tools(chat_server: Server) -> None:
    ask = {"model": "scripted", "tools": TOOLS, "temperature": 0, "reasoning": {"effort": "low"}}
    create = chat_server.client.responses.create
    question = {"role": "user", "content": [{"type": "input_text", "text": "Say it."}]}
    first = create(**ask, input=[question])  # type: ignore[call-overload]
    result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "3"}
    again = create(**ask, input=[question, *(item.model_dump() for item in first.output), result])  # type: ignore[call-overload]
    assert again.output_text == ANSWER
    assert again.usage.input_tokens > first.usage.input_tokens


def test_input_and_instructions_are_a_conversation(demo_server: Server) -> None:
    ask = {"model": "demo", "temperature": 0}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = demo_server.client.chat.completions.create(**ask, messages=messages, max_tokens=6)  # type: ignore[call-overload]
    for asked in ({"instructions": "Be brief.", "input": "Hi"}, {"input": messages}):
        answer = demo_server.client.responses.create(**ask, **asked, max_output_tokens=6)  # type: ignore[call-overload]
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    stream = demo_server.client.responses.create(**ask, **asked, max_output_tokens=6, stream=True)  # type: ignore[call-overload]
    assert list(stream)[-1].type == "response.incomplete"


def test_structured_output_parsed_by_the_client(demo_server: Server) -> None:
    class Answer(BaseModel):
        sure: bool
        grade: Literal[1, 2, 3]

    ask = {"model": "demo", "input": "Say it.", "text_format": Answer, "max_output_tokens": 60, "temperature": 0}
    answer = demo_server.client.responses.parse(**ask)  # type: ignore[call-overload]
    assert isinstance(answer.output_parsed, Answer)


def test_a_call_can_be_forced(chat_server: Server) -> None:
    units = {"type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]}
    tools = [{"type": "function", "name": "oven", "parameters": units}, *TOOLS]
    choice = {"type": "function", "name": "oven"}
    ask = {"model": "scripted", "input": "Say it.", "tools": tools, "tool_choice": choice, "temperature": 0}
    (call,) = chat_server.client.responses.create(**ask).output  # type: ignore[call-overload]
    assert (call.type, call.name) == ("function_call", "oven")
    assert json.loads(call.arguments)["unit"] in ("c", "f")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"previous_response_id": "resp_1"}, "responses are not kept: send their items again"),
        ({"store": True}, "'store' is not valid"),
        ({"background": True}, "'background' is not valid"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "not a JSON object"),
        ({"conversation": "x"}, "'conversation' is not supported"),
        ({"reasoning": {"effort": "high"}}, "cannot turn it on"),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused_in_a_sentence(demo_server: Server, more: dict, words: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        demo_server.client.responses.create(**{"model": "demo", "input": "Hi"} | more)  # type: ignore[call-overload]
    assert words in refused.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), ("\ud800", "lone surrogate")])
def test_what_json_has_no_form_for_is_refused(demo_server: Server, value: object, words: str) -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"x": value}}]
    body = json.dumps({"input": "Hi", "tools": tools, "tool_choice": "none"})
    headers = {"Content-Type": "application/json"}
    status, error = demo_server.refusal("/v1/responses", content=body, headers=headers)
    assert status == 400
    assert words in error["message"]
