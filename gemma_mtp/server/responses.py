"""The body of OpenAI's /v1/responses, and the conversation it asks to go on with."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.server.messages import Said
from gemma_mtp.server.schema import JsonObjectFormat, JsonSchema, TextFormat
from gemma_mtp.server.values import Body, Listed, Object


class Text(Said):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


class Item(Said):
    """What a conversation is made of, as clients write it or send it back."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Listed[Text]
    phase: str | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Listed[Text]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: Listed[Text] = Field(default_factory=list)
    content: Listed[Text] | None = None


class Function(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None  # without effect: a forced call always has the form of its parameters

    def plain(self) -> Object:
        """The declaration as chats have it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}
        return {"type": "function", "function": function}


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]

    @property
    def grammar(self) -> Grammar:
        return Grammar.json_schema(self.json_schema)


class TextSettings(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: None = None


class Reasoning(Body):
    """Gemma thinks or does not: every effort but 'none' lets it."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: None = None
    generate_summary: None = None


class Obfuscation(Body):
    include_obfuscation: Literal[False] = False


class ResponsesBody(Body):
    """`seed`, `top_k` and `draft` are ours."""

    model: str | None = None
    input: Annotated[
        Listed[Annotated[MessageItem | CallItem | ResultItem | ReasoningItem, Field(discriminator="type")]],
        Field(min_length=1),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: Listed[Function] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    draft: Literal["auto", "off"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    # Without effect on the answer.
    background: Literal[False] | None = None
    include: Listed[Literal["reasoning.encrypted_content"]] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    stream_options: Obfuscation | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _name_messages(cls, value: Any) -> Any:
        """A text alone is the user's; a message need not say that it is one."""
        if isinstance(value, str):
            return [{"type": "message", "role": "user", "content": value}]
        if not isinstance(value, list):
            return value
        return [{"type": "message", **item} if isinstance(item, dict) else item for item in value]

    @model_validator(mode="after")
    def _check(self) -> "ResponsesBody":
        if self.previous_response_id is not None:
            raise ValueError("'previous_response_id' is given, but responses are not kept: send their items again.")
        return self

    @property
    def conversation(self) -> list[Object]:
        messages: list[Object] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if isinstance(item, ResultItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                messages.append({"role": item.role, "content": _text(item.content)})
            else:
                _add_answer(messages, item)
        return messages

    @property
    def declared_tools(self) -> list[Object] | None:
        return None if self.tool_choice == "none" else [tool.plain() for tool in self.tools or ()] or None

    @property
    def forced_choice(self) -> str | Object:
        """The choice in the form of chats."""
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            return {"type": "function", "function": {"name": choice.name}}
        return choice or "auto"

    @property
    def thinks(self) -> bool:
        return self.reasoning is not None and self.reasoning.effort not in (None, "none")

    def sampling(self, most: int) -> SamplingParams:
        """most: tokens where the request does not say how many. Raises SettingsError."""
        shape = self.text.format if self.text else None
        return SamplingParams(
            max_tokens=self.max_output_tokens or most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),
            top_k=self.top_k,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            grammar=shape.grammar if shape else None,
        )

    def echoed(self) -> Object:
        """What a response repeats of its request."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": _dumped(self.text.format) if self.text and self.text.format else {"type": "text"}},
            "tool_choice": _dumped(choice) if isinstance(choice, NamedFunction) else choice or "auto",
            "tools": [_dumped(tool) for tool in self.tools or ()],
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
        }


def _add_answer(messages: list[Object], item: MessageItem | CallItem | ReasoningItem) -> None:
    """Adds an item of the assistant's: reasoning, text and calls that follow each other are one message of a chat."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and last["content"]):
        messages.append(last := {"role": "assistant", "content": ""})
    if isinstance(item, ReasoningItem):
        last["reasoning_content"] = _text(item.content or item.summary)
    elif isinstance(item, MessageItem):
        last["content"] = _text(item.content)
    else:
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        last.setdefault("tool_calls", []).append(call)


def _text(content: str | list[Text]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _dumped(body: Body) -> Object:
    return body.model_dump(by_alias=True)
