"""LangChain's and LlamaIndex's OpenAI clients against real servers; what they need is the extra `clients`."""

import json

import pytest

from ..scripted import ANSWER, CALL
from .conftest import KEY, Server

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

LANGCHAIN = "langchain-openai is not installed: pip install '.[clients]'"
LLAMA_INDEX = "llama-index-llms-openai-like is not installed: pip install '.[clients]'"
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def test_langchain_chats_streams_calls_and_parses(chat_server: Server, demo_server: Server) -> None:
    chats = pytest.importorskip("langchain_openai", reason=LANGCHAIN)
    scripted = chats.ChatOpenAI(base_url=f"{chat_server.url}/v1", api_key=KEY, model="scripted", temperature=0)
    answer = scripted.bind_tools([ADD]).invoke("Say it.")
    assert answer.content == ANSWER
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("add", CALL["arguments"])]
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in scripted.stream("Say it.")) == ANSWER
    city = {"city": {"enum": ["Paris", "Berlin"]}}
    schema = {"title": "who", "type": "object", "properties": city, "required": ["city"], "additionalProperties": False}
    demo = chats.ChatOpenAI(base_url=f"{demo_server.url}/v1", api_key=KEY, model="demo", max_completion_tokens=40)
    assert demo.with_structured_output(schema, method="json_schema").invoke("Where?")["city"] in ("Paris", "Berlin")


def test_langchain_speaks_responses(chat_server: Server) -> None:
    chats = pytest.importorskip("langchain_openai", reason=LANGCHAIN)
    address = {"base_url": f"{chat_server.url}/v1", "api_key": KEY}
    scripted = chats.ChatOpenAI(**address, model="scripted", temperature=0, use_responses_api=True)
    answer = scripted.bind_tools([ADD]).invoke("Say it.")
    assert answer.text == ANSWER
    assert [call["name"] for call in answer.tool_calls] == ["add"]


def test_llama_index_chats_streams_and_completes(chat_server: Server, demo_server: Server) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like", reason=LLAMA_INDEX)
    messages = [pytest.importorskip("llama_index.core.llms").ChatMessage(role="user", content="Say it.")]
    options = {"api_key": KEY, "temperature": 0, "max_tokens": 60}
    kind = {"is_chat_model": True, "is_function_calling_model": True}
    scripted = like.OpenAILike(model="scripted", api_base=f"{chat_server.url}/v1", **kind, **options)
    assert scripted.chat(messages).message.content == ANSWER
    assert "".join(chunk.delta or "" for chunk in scripted.stream_chat(messages)) == ANSWER
    raw = scripted.chat(messages, tools=[ADD]).message.additional_kwargs["tool_calls"]
    assert json.loads(raw[0].function.arguments) == CALL["arguments"]
    demo = like.OpenAILike(model="demo", api_base=f"{demo_server.url}/v1", is_chat_model=False, **options)
    assert demo.complete("The capital of France is").text
