"""The bodies of requests to OpenAI's chats and completions, and to the server's own routes."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.server.values import Body, Listed, Object, Stops

MAX_CHOICES = 16
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, strict=True)]
Tokens = Annotated[Listed[TokenId], Field(min_length=1)]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Body):
    name: str
    description: str | None = None
    json_schema: Object = Field(alias="schema")
    strict: bool | None = None  # without effect: what comes always has the schema's form


class TextFormat(Body):
    type: Literal["text"]
    grammar: ClassVar[None] = None


class JsonObjectFormat(Body):
    type: Literal["json_object"]

    @property
    def grammar(self) -> Grammar:
        return Grammar.json_object()


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def grammar(self) -> Grammar:
        return Grammar.json_schema(self.json_schema.json_schema)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """What an answer must be, in one of these ways; the names are vLLM's."""

    json_schema: Object | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[Listed[str], Field(min_length=1)] | None = None
    lark: str | None = Field(None, alias="grammar")

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("'structured_outputs' needs one of json, json_object, regex, choice and grammar.")
        return self

    @property
    def grammar(self) -> Grammar:
        """Raises SettingsError."""
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        if self.lark is not None:
            return Grammar.lark(self.lark)
        return Grammar.json_object() if self.json_schema is None else Grammar.json_schema(self.json_schema)


class Common(Body):
    """What chats and completions have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    draft: Literal["auto", "off"] | Annotated[int, Field(ge=0, strict=True)] | None = None
    speculative_n_max: Annotated[int, Field(ge=0, strict=True)] | None = Field(None, alias="speculative.n_max")
    timings_per_token: bool = False  # llama.cpp's: every event of a stream has timings
    return_token_ids: bool = False  # vLLM's: choices have `token_ids`
    # Without effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("The parameter 'stream_options' is for streams: set 'stream' as well.")
        if self.draft is not None and self.speculative_n_max is not None:
            raise ValueError("Both 'draft' and 'speculative.n_max' are given, which mean the same: give one.")
        if self.response_format is not None and self.response_format.type != "text" and self.structured_outputs:
            raise ValueError("Both 'response_format' and 'structured_outputs' say what an answer must be: give one.")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """Raises SettingsError."""
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar
        return self.response_format.grammar if self.response_format is not None else None

    @property
    def drafting(self) -> int | str:
        given = self.draft if self.draft is not None else self.speculative_n_max
        return "auto" if given is None else given

    @property
    def choices(self) -> int:
        return self.n or 1

    def sampling(self, max_tokens: int, logprobs: int, of_prompt: bool = False) -> list[SamplingParams]:
        """The settings of each choice: choice i has the seed plus i. of_prompt: whether log probabilities, if there are
        any, are of the prompt too. Raises SettingsError."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        grammar = self.grammar
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(self.top_k or 0, 0),
                top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),
                min_p=self.min_p or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                seed=(seed + choice) % 2**64,
                stop=self.stop or (),
                logprobs=logprobs,
                ignore_eos=self.ignore_eos,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=self.logit_bias or {},
                prompt_logprobs=of_prompt and logprobs > 0,
                grammar=grammar,
            )
            for choice in range(self.choices)
        ]


class CompletionBody(Common):
    prompt: str | Tokens | Annotated[Listed[str], Field(min_length=1)] | Annotated[Listed[Tokens], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionBody":
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise ValueError("'max_tokens' is 0, for the prompt's log probabilities alone: set 'echo' and 'logprobs'.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Prediction(Body):
    type: Literal["content"]
    content: str | Listed[TextPart]


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class TemplateOptions(Body):
    enable_thinking: bool = False


class ChatMessage(BaseModel):
    """A message as clients send it, or send back what the server said: what they add to it must be empty."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | Listed[Object] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Listed[Object] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_extra(self) -> "ChatMessage":
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"Messages with '{name}' are not supported.")
        return self

    def plain(self) -> Mapping[str, Any]:
        return self.model_dump(include=set(ChatMessage.model_fields), exclude_none=True)


class ChatBody(Common):
    messages: Annotated[Listed[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Listed[Object] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("The parameter 'top_logprobs' is given without 'logprobs': set that as well.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' mean the same but differ: give one.")
        return self

    @property
    def predicted(self) -> str | None:
        content = self.prediction.content if self.prediction else None
        return "".join(part.text for part in content) if isinstance(content, list) else content

    @property
    def thinking(self) -> bool:
        return self.chat_template_kwargs is not None and self.chat_template_kwargs.enable_thinking

    @property
    def forced_choice(self) -> str | dict[str, Any]:
        choice = self.tool_choice
        return choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto"

    @property
    def declared_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools or None


class TokenizeBody(Body):
    """What vLLM and llama.cpp take."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_text(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.content is None):
            raise ValueError("Give the text to tokenize as 'prompt' or as 'content'.")
        return self

    @property
    def text(self) -> str:
        return self.prompt if self.prompt is not None else self.content or ""


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Listed[TokenId]
