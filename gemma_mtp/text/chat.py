"""Conversations to prompts, by the template that a checkpoint brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gemma_mtp.errors import CheckpointError, PromptError
from gemma_mtp.text.chat_parser import ChatParser
from gemma_mtp.text.tokenizer import Tokenizer, read_json

if TYPE_CHECKING:  # jinja2 is imported when a conversation is first rendered: a plain prompt starts without it
    import jinja2

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Gemma's turns before Gemma 4. There was no system turn: the system's words start the turn after them,
# or where there is none are the user's.
_PLAIN = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set ns.system = ns.system + message.content | trim + '\n\n' %}
{%- else -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ ns.system + message.content | trim }}<end_of_turn>
{% set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if ns.system | trim %}<start_of_turn>user
{{ ns.system | trim }}<end_of_turn>
{% endif %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


class ChatTemplate:
    """Renders conversations with a Jinja template, as Hugging Face checkpoints and GGUF files carry it.

    The template runs in Jinja's immutable sandbox and sees what transformers gives it: `messages`, `tools`,
    `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`, `strftime_now`, the filter `tojson`, the tag
    `generation`, `break` and `continue`.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def plain(cls, bos_token: str = "<bos>") -> ChatTemplate:
        """Gemma's turn format, for a checkpoint without a template."""
        return cls(_PLAIN, bos_token=bos_token)

    @property
    def is_plain(self) -> bool:
        """Whether this is the format of `plain`, not a checkpoint's own template."""
        return self.source == _PLAIN

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template among a GGUF file's metadata, or the plain one. Raises CheckpointError."""
        return cls._of(metadata.get("tokenizer.chat_template"), tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a Hugging Face folder (chat_template.jinja, or in tokenizer_config.json), or the plain one.
        Raises CheckpointError."""
        return cls._of(folder_template(Path(folder)), tokenizer)

    @classmethod
    def _of(cls, source: Any, tokenizer: Tokenizer) -> ChatTemplate:
        def spelled(id: int | None) -> str:
            return "" if id is None else tokenizer.token_text(id)

        if source is None:
            return cls.plain(spelled(tokenizer.bos_id))
        if not isinstance(source, str):
            raise CheckpointError("The checkpoint's chat template is not a text.")
        return cls(source, bos_token=spelled(tokenizer.bos_id), eos_token=spelled(min(tokenizer.eos_ids, default=None)))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt of a conversation, to be encoded with `bos=False`: the template spells out the special tokens.

        messages: OpenAI's, {"role": ..., "content": str or a list of {"type": "text", "text": str}}, with "tool_calls"
        and "reasoning_content" of the assistant and "tool_call_id" of tools where there are any. tools: OpenAI's
        declarations. options: what else the template reads, such as `enable_thinking`. Raises PromptError, or
        CheckpointError where the template itself is broken.
        """
        from jinja2.sandbox import SecurityError

        conversation = _checked(messages)
        if "tool_responses" in self.source:
            conversation = _with_tool_responses(conversation)
        names: dict[str, Any] = {
            **self._tokens,
            **options,
            "messages": conversation,
            "tools": _checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._compiled
        try:
            return template.render(names)
        except _Refusal as refusal:
            raise PromptError(f"The chat template does not take this conversation: {refusal}.") from None
        except SecurityError as fault:
            raise CheckpointError(f"The checkpoint's chat template does what no template may do: {fault}.") from None
        except Exception as fault:  # a template is a program: it can fail in any way
            raise PromptError(f"The chat template cannot render this conversation: {fault}.") from None

    def parser(self, prompt: str = "") -> ChatParser:
        """A parser of what the model answers to `prompt`: reasoning and tool calls, where the template writes them."""
        return ChatParser(
            reasoning="<|channel>" in self.source,
            tool_calls="<|tool_call>" in self.source,
            prompt=prompt,
        )

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end the assistant's turn: the checkpoint's, and those the template itself puts at its end."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        question: Message = {"role": "user", "content": "q"}
        turns: list[Message] = [
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        ends = set(tokenizer.eos_ids)
        for turn in turns:
            try:
                text = self.render([question, turn], add_generation_prompt=False).rstrip()
            except PromptError:
                continue  # a template need not take tool calls
            last = tokenizer.encode(text, bos=False)[-1:]
            ends |= tokenizer.added_ids.intersection(last)
        return frozenset(ends)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class GenerationTag(jinja2.ext.Extension):
            """{% generation %} ... {% endgeneration %}: the words a training would count, here just words."""

            tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                return jinja2.nodes.Scope(
                    parser.parse_statements(("name:endgeneration",), drop_needle=True)
                ).set_lineno(line)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as fault:
            raise CheckpointError(
                f"The checkpoint's chat template has an error in line {fault.lineno}: {fault.message}."
            ) from None


def folder_template(folder: Path) -> Any:
    """The template of a Hugging Face folder as it stands there, None if it has none. Raises CheckpointError."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as fault:
            raise CheckpointError(f"{file} cannot be read: {fault}.") from None
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source


class _Refusal(Exception):
    """What a template says through raise_exception."""


def _refuse(reason: Any) -> NoReturn:
    raise _Refusal(str(reason).rstrip("."))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's filter of that name, this escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates expect them: content is a string, arguments of tool calls are objects."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise PromptError("A conversation needs a list with at least one message.")
    return [_checked_message(message, number) for number, message in enumerate(messages, 1)]


def _checked_message(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"Message {number} is not an object with a role and a content.")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise PromptError(f"Message {number} has the role {role!r}, which is none of {', '.join(ROLES)}.")
    checked = {**message, "role": role, "content": _text(message.get("content"), number, message)}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise PromptError(f"Message {number} has tool calls that are not a list.")
        checked["tool_calls"] = [_checked_call(call, number) for call in calls]
    return checked


def _text(content: Any, number: int, message: Message) -> str:
    if isinstance(content, str):
        return content
    if content is None and (message.get("tool_calls") or message.get("role") == "tool"):
        return ""
    if not isinstance(content, Sequence):
        raise PromptError(f"Message {number} has no content: give a string or a list of text parts.")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise PromptError(f"Message {number} has a part that is not of the type 'text', the only one supported.")
        texts.append(text)
    return "".join(texts)


def _checked_call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f"Message {number} has a tool call without the name of a function.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise PromptError(f"Message {number} calls '{function['name']}' with arguments that are not a JSON object.")
    return {**call, "function": {**function, "arguments": arguments}}


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError("A tool is declared as {'type': 'function', 'function': {'name': ..., ...}}.")
    return list(tools) if tools else None


def _with_tool_responses(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts tools' messages into the assistant message that called them, as its `tool_responses`.

    All of Gemma 4's templates take that form; the first ones take no messages of the role 'tool', and want the answer
    that follows in the same message too.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        caller = out[-1] if out and out[-1].get("tool_calls") else None
        if caller and message["role"] == "tool":
            named = {call.get("id"): call["function"]["name"] for call in caller["tool_calls"]}
            name = named.get(message.get("tool_call_id"), message.get("name") or "unknown")
            response = {"name": name, "response": message["content"]}
            out[-1] = {**caller, "tool_responses": [*caller.get("tool_responses", ()), response]}
        elif caller and caller.get("tool_responses") and not caller["content"] and _is_answer(message):
            out[-1] = {**caller, "content": message["content"]}
        else:
            out.append(message)
    return out


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls") and message["content"] != ""
