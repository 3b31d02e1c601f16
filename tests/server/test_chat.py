"""Conversations through OpenAI's own client: reasoning, tool calls, and a model without a template."""

import json

import pytest
from openai import BadRequestError

from gemma_mtp import Model, SamplingParams

from ..scripted import ANSWER, CALL, REASONING
from .conftest import Server

QUESTION = [{"role": "user", "content": "Say it."}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def test_reasoning_content_and_tool_calls_come_apart(chat_server: Server) -> None:
    ask = {"model": "scripted", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "extra_body": THINK}
    answer = chat_server.client.chat.completions.create(**ask)
    choice = answer.choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == (REASONING, ANSWER)
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0

    reasoning = content = ""
    calls, reasons = [], []
    stream = chat_server.client.chat.completions.create(**ask, stream=True)
    for chunk in stream:
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
        last = chunk
    assert (reasoning, content) == (REASONING, ANSWER)
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert json.loads(calls[0].function.arguments) == CALL["arguments"]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]
    assert last.timings["predicted_n"] == answer.usage.completion_tokens


def test_a_tools_result_goes_back_with_the_answer_it_was_asked_in(chat_server: Server) -> None:
    create = chat_server.client.chat.completions.create
    first = create(model="scripted", messages=QUESTION, tools=TOOLS, temperature=0).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "3"}
    again = create(model="scripted", messages=[*QUESTION, first.model_dump(), result], tools=TOOLS, temperature=0)
    assert again.choices[0].message.content == ANSWER


@pytest.mark.parametrize("draft", ["off", "auto"])
def test_an_answer_ends_after_one_call_where_one_is_wanted(chat_server: Server, draft: str) -> None:
    ask = {"model": "scripted", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "extra_body": {"draft": draft}}
    whole = chat_server.client.chat.completions.create(**ask)
    ended = chat_server.client.chat.completions.create(**ask, parallel_tool_calls=False)
    assert ended.choices[0].finish_reason == "tool_calls"
    assert ended.choices[0].message.content == ANSWER
    (call,) = ended.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert ended.usage.completion_tokens == whole.usage.completion_tokens - 1  # which ends the turn

    tools = [{"name": "add", "input_schema": {"type": "object"}}]
    body = {"messages": QUESTION, "max_tokens": 64, "temperature": 0, "tools": tools}
    used = []
    for choice in ({}, {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}):
        answer = chat_server.http.post("/v1/messages", json=body | choice).json()
        assert answer["stop_reason"] == "tool_use"
        used.append(answer["usage"]["output_tokens"])
    assert used == [whole.usage.completion_tokens, ended.usage.completion_tokens]


def test_tool_choice_none_declares_no_tools(chat_server: Server) -> None:
    def tokens(**more: object) -> int:
        ask = {"model": "scripted", "messages": QUESTION, "max_completion_tokens": 1, "temperature": 0}
        return chat_server.client.chat.completions.create(**ask, **more).usage.prompt_tokens  # type: ignore[call-overload]

    assert tokens(tools=TOOLS, tool_choice="none") == tokens() < tokens(tools=TOOLS, tool_choice="auto")


def test_log_probabilities_are_of_the_content(chat_server: Server) -> None:
    ask = {"model": "scripted", "messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = chat_server.client.chat.completions.create(**ask, stop=" you").choices[0]
    streamed = list(chat_server.client.chat.completions.create(**ask, stop=" you", stream=True))
    entries = [e for chunk in streamed if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in whole.logprobs.content] == ["Hello", " there", " you"]
    assert [entry.token for entry in entries] == ["Hello", " there", " you"]
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert (len(entry.top_logprobs), entry.top_logprobs[0].token) == (2, entry.token)
        assert entry.logprob == entry.top_logprobs[0].logprob
    assert (whole.message.content, whole.finish_reason) == ("Hello there", "stop")


def test_a_prediction_makes_rounds_fewer_and_leaves_the_text(demo_server: Server) -> None:
    ask = {"model": "demo", "messages": QUESTION, "max_tokens": 32, "seed": 5, "extra_body": {"draft": 8}}
    create = demo_server.client.chat.completions.create
    plain = create(**ask)  # type: ignore[call-overload]
    text = plain.choices[0].message.content
    for content in (text, [{"type": "text", "text": text}]):
        predicted = create(**ask, prediction={"type": "content", "content": content})  # type: ignore[call-overload]
        assert predicted.choices[0].message.content == text
        assert predicted.usage.prompt_tokens == plain.usage.prompt_tokens
        details = predicted.usage.completion_tokens_details
        assert details.accepted_prediction_tokens > 16
        assert details.accepted_prediction_tokens > plain.usage.completion_tokens_details.accepted_prediction_tokens
    wrong = create(**ask, prediction={"type": "content", "content": "Nothing of the kind. " * 9})  # type: ignore[call-overload]
    assert wrong.choices[0].message.content == text
    assert wrong.usage.completion_tokens_details.rejected_prediction_tokens > 0


def test_a_model_without_a_template_gets_plain_turns_and_a_line_in_the_log(demo_server: Server, demo: Model) -> None:
    parts = [{"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    expected = demo.generate(messages, SamplingParams(max_tokens=6)).text  # type: ignore[arg-type]
    ask = {"model": "demo", "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = demo_server.client.chat.completions.create(**ask)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == expected
    assert demo_server.log.count("brings no chat template") == 1
    with pytest.raises(BadRequestError, match="no place for them"):
        demo_server.client.chat.completions.create(**ask, tools=TOOLS)  # type: ignore[call-overload]
