"""The body of Anthropic's /v1/messages, and the conversation it asks to go on with."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.server.values import Body, Listed, Object, Stops

Cached = Object | None  # of `cache_control`: where a prompt may be cached, without effect on the answer


class Said(BaseModel):
    """A block as clients send it, or send back what a server said: what they add to it must be empty."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check_extra(self) -> "Said":
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"Blocks with '{name}' are not supported.")
        return self


class TextBlock(Said):
    type: Literal["text"]
    text: str
    cache_control: Cached = None


class ThinkingBlock(Said):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Said):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Object
    cache_control: Cached = None


class ToolResultBlock(Said):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Listed[TextBlock] = Field(default_factory=list)
    is_error: bool = False
    cache_control: Cached = None

    @field_validator("content", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        return as_blocks(value)


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Message(Body):
    role: Literal["user", "assistant"]
    content: Listed[Block]

    @field_validator("content", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        return as_blocks(value)

    @model_validator(mode="after")
    def _check_blocks(self) -> "Message":
        fitting = ("text", "tool_result") if self.role == "user" else ("text", "thinking", "tool_use")
        for block in self.content:
            if block.type not in fitting:
                raise ValueError(f"A message of the role '{self.role}' has no place for a block of '{block.type}'.")
        return self

    def plain(self) -> list[dict[str, Any]]:
        """The message in OpenAI's form: tools' results are messages of their own there, before what the user says."""
        blocks = self.content
        text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
        if self.role == "user":
            results = [_result(block) for block in blocks if isinstance(block, ToolResultBlock)]
            return [*results, *([{"role": "user", "content": text}] if text or not results else [])]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
            message["reasoning_content"] = thought
        if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        return [message]


class Tool(Body):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: Object
    cache_control: Cached = None


class ToolChoice(Body):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_type(self) -> "ToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("A 'name' belongs to a 'tool_choice' of the type 'tool', and to no other.")
        return self


class Thinking(Body):
    type: Literal["adaptive", "disabled", "enabled"]
    budget_tokens: int | None = None

    @model_validator(mode="after")
    def _check_type(self) -> "Thinking":
        if self.type == "enabled":
            raise ValueError("A budget of thinking cannot be kept to here: use 'thinking' of the type 'adaptive'.")
        return self


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """What is asked, without how."""

    model: str | None = None
    messages: Annotated[Listed[Message], Field(min_length=1)]
    system: Listed[TextBlock] = Field(default_factory=list)
    tools: Listed[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Cached = None

    @field_validator("system", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        return as_blocks(value)

    @model_validator(mode="after")
    def _check_last(self) -> "CountBody":
        if self.messages[-1].role != "user":
            raise ValueError("The last message is the assistant's, whose answer cannot be begun: end with the user's.")
        return self

    @property
    def conversation(self) -> list[dict[str, Any]]:
        system = "\n".join(block.text for block in self.system)
        said = [message for one in self.messages for message in one.plain()]
        return [{"role": "system", "content": system}, *said] if system else said

    @property
    def declared_tools(self) -> list[dict[str, Any]] | None:
        if not self.tools or (self.tool_choice is not None and self.tool_choice.type == "none"):
            return None
        return [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
            }
            for tool in self.tools
        ]

    @property
    def forced_choice(self) -> str | dict[str, Any]:
        """The choice in OpenAI's form."""
        if self.tool_choice is None or self.tool_choice.type in ("auto", "none"):
            return "auto"
        if self.tool_choice.type == "any":
            return "required"
        return {"type": "function", "function": {"name": self.tool_choice.name}}

    @property
    def several_calls(self) -> bool:
        return self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use

    @property
    def thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type == "adaptive"


class MessagesBody(CountBody):
    """`seed` and `draft` are ours."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    stop_sequences: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    draft: Literal["auto", "off"] | Annotated[int, Field(ge=0, strict=True)] = "auto"
    # Without effect on the answer.
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def sampling(self) -> SamplingParams:
        """Raises SettingsError."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=max(self.top_p, 1e-6),
            top_k=self.top_k,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=self.stop_sequences or (),
        )


def as_blocks(value: Any) -> Any:
    """A text where blocks may stand is one block."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _result(block: ToolResultBlock) -> dict[str, Any]:
    text = "".join(part.text for part in block.content)
    content = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
