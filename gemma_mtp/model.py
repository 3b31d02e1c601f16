"""The public face of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, Unpack

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.acceptance import Experience
from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.economy import Alone, CostShape
from gemma_mtp.decoding.grammar import Constraint
from gemma_mtp.decoding.progress import Progress, TextStream, check_length, check_prompt
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.cost_shape import cost_shape
from gemma_mtp.engine.interface import AnyEngine
from gemma_mtp.errors import PromptError, SettingsError
from gemma_mtp.generation import Generation, Stream
from gemma_mtp.loading import Settings, load
from gemma_mtp.text.answer_grammar import answer_grammar
from gemma_mtp.text.chat import ChatTemplate, Message
from gemma_mtp.text.chat_text import ChatText
from gemma_mtp.text.guidance import Guide, parts_of
from gemma_mtp.text.tokenizer import Detokenizer, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
ToolChoice = str | Mapping[str, Any]  # "auto", "required" or {"type": "function", "function": {"name": ...}}
Draft = int | str  # "auto", "off" or a number of tokens
_MOST_OF_A_TOKEN = 16  # characters, of nearly all: of predictions, more than so many for each token are left out


class AnswerOptions(TypedDict, total=False):
    """What Model.generate, Model.stream and AsyncEngine.submit take beside prompt, settings and draft.

    tools: declared in OpenAI's form, for conversations. tool_choice: can force a call: "required", or OpenAI's object
    that names a function. With that, and without `parallel_tool_calls`, an answer ends with its first call. thinking:
    lets the model reason before it answers. prediction: what the output is expected to be, or to hold parts of; lookup
    drafts from it.
    """

    tools: Tools | None
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    thinking: bool
    prediction: str | None


@dataclass(frozen=True)
class Asked:
    """A generation that was asked for, ready to run."""

    ids: list[int]
    params: SamplingParams
    text: TextStream
    ends: frozenset[int]
    """The tokens that end it."""
    draft: Draft
    chat: ChatText | None
    """`text` once more, where the prompt is a conversation."""
    prediction: list[int]
    """Tokens that lookup may draft from."""
    constraint: Constraint | None = None
    """Keeps it to a grammar."""


class Model:
    """A target with what drafts for it. Make one with `Model.load`."""

    def __init__(
        self,
        engine: AnyEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        name: str,
        drafter_name: str | None = None,
        cost_key: str | None = None,
    ):
        """cost_key: under which the cost of passes of several rows is kept (engine/cost_shape.py)."""
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self.name = name
        self.drafter_name = drafter_name or "prompt-lookup"
        self._cost_key = cost_key
        self._cost_shape: CostShape | None = None
        self._experience = Experience()

    @classmethod
    def load(
        cls,
        model: str | Path = "demo",
        drafter: str | Path = "auto",
        backend: str = "native",
        threads: int | None = None,
        context: int | None = None,
        dtype: str | None = None,
        isa: str = "auto",
        drafter_dtype: str | None = None,
        device: str = "auto",
        cache: bool | None = None,
        kv: str | None = None,
    ) -> Model:
        """Loads a checkpoint.

        model: "demo", a GGUF file, a folder as Hugging Face has it, or owner/name[:file] in the local hub cache.
        drafter: a drafter's file, folder or name; "none": only prompt lookup drafts. "auto" takes the one beside the
        model, if there is one. backend: "native" runs our kernels, "torch" PyTorch on `device`, "auto" being the first
        that there is of cuda, mps and cpu.
        threads: of a pass; if None one a core, but fewer for a small model. context: tokens a generation may hold, with
        the prompt; 8192 or what the model was trained for if None. dtype: "as-is" keeps the file's quantisation (None
        means that), "f32" computes all in float32, and "q8_0", "q4_k" and the like (checkpoints/quantization.py)
        quantise matrices as they are loaded. isa: the instruction-set build, "auto" the best this CPU runs.
        drafter_dtype: the dtype of the drafter; None: "f32" with a target in "f32", otherwise "q8_0" for a drafter that
        is not quantised, and as is for others. With torch a dtype is what weights and their products are in: f32, bf16
        or f16; as is, f32 on a CPU and bf16 elsewhere.
        cache: keep packed weights in the user's cache folder for the next start (docs/packed.md); None: as the variable
        GEMMA_MTP_CACHE says (on, auto or off), or if they take less than 2 GiB, which "auto" means.
        kv: how the native backend keeps keys and values: "f16" (None means that), "q8_0" for half the memory and nearly
        the same logits, or "f32" (as with a dtype of "f32"). A drafter reads the same ones.
        Raises CheckpointError, SettingsError, PairError.
        """
        loaded = load(model, drafter, Settings(backend, threads, context, dtype, drafter_dtype, isa, device, cache, kv))
        return cls(
            loaded.engine, loaded.tokenizer, loaded.template, loaded.name, loaded.drafter_name, loaded.cost_key
        )

    @property
    def config(self) -> ModelConfig:
        return self._engine.config

    @property
    def context(self) -> int:
        """The most tokens of a generation, prompt included."""
        return self._engine.context

    @property
    def threads(self) -> int:
        return self._engine.threads

    @property
    def engine(self) -> AnyEngine:
        """What runs the passes: for benchmarks and tests."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a template for conversations; without one they are written in plain turns."""
        return not self._template.is_plain

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """Continues a prompt (text or token ids), or answers a conversation. Its tokens do not depend on `draft`.

        A conversation is a list of messages in OpenAI's form, {"role": ..., "content": ...}. Stop strings are looked
        for in the answer alone.
        """
        stream = self.stream(prompt, params, draft, **options)
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """The same, piece by piece. Raises PromptError and SettingsError before the first piece."""
        asked = self.ask(prompt, params, draft, **options)
        depth: DepthControl | None = None
        if asked.draft == "auto":
            depth = AutoDepth(Alone(self.cost_shape, self._experience))
        elif isinstance(asked.draft, int):
            depth = FixedDepth(asked.draft)
        progress = Progress(
            asked.ids,
            asked.params,
            text=asked.text,
            context=self.context,
            depth=depth,
            constraint=asked.constraint,
            eos_ids=asked.ends,
        )
        return Stream(progress, self._engine, asked.prediction, asked.chat)

    @property
    def cost_shape(self) -> CostShape:
        """What passes cost, by their rows, measured if it has to be."""
        with self._engine.lock:  # what other threads run would be measured too
            if self._cost_shape is None:
                self._cost_shape = cost_shape(self._engine, self._cost_key)
            return self._cost_shape

    def ask(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool = False,
        prediction: str | None = None,
    ) -> Asked:
        """What a generation needs to run, checked: see AnswerOptions. Raises PromptError and SettingsError."""
        ends = self._tokenizer.eos_ids | set(self.config.eos)
        chat: ChatText | None = None
        if _is_conversation(prompt):
            one_call = not parallel_tool_calls or isinstance(tool_choice, Mapping)
            ids, chat = self._open_chat(prompt, tools, thinking, one_call)
            ends |= self._turn_ends
        elif tools or thinking:
            raise SettingsError("Tools and thinking are for conversations: give a list of messages as the prompt.")
        else:
            ids = self._prompt(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]  # type: ignore[arg-type]
        check_prompt(ids, self.context)
        outside = next((token for token in ids if not 0 <= token < self.config.vocab), None)
        if outside is not None:
            raise PromptError(f"The prompt has the token {outside}, outside the vocabulary of {self.config.vocab}.")
        params = params or SamplingParams()
        outside = next((token for token, _ in params.biases if token >= self.config.vocab), None)
        if outside is not None:
            raise SettingsError(f"logit_bias has the token {outside}, outside the vocabulary of {self.config.vocab}.")
        expected = self._expected(prediction) if prediction else []
        text: TextStream = chat or _Text(self._tokenizer.stream(skip_special=True))
        constraint = self._constraint(params, chat, thinking, tools or (), tool_choice)
        return Asked(ids, params, text, frozenset(ends), self._checked_draft(draft), chat, expected, constraint)

    def _prompt(self, text: str, bos: bool = True) -> list[int]:
        """A prompt's tokens. One that is too long for any tokens is refused unencoded: that can take long."""
        if len(text) > _MOST_OF_A_TOKEN * self.context and (longest := self._tokenizer.longest):
            check_length(-(-len(text) // longest), self.context, "at least ")
        return self._tokenizer.encode(text, bos=bos)

    def _expected(self, prediction: str) -> list[int]:
        """The tokens of a prediction, as many as the context holds."""
        tokens = self._tokenizer.encode(prediction[: _MOST_OF_A_TOKEN * self.context], bos=False)[: self.context]
        return list(takewhile(lambda token: token < self.config.vocab, tokens))  # tokenizers may know more

    def tokenize(self, text: str) -> list[int]:
        """Token ids, the beginning-of-sequence token first where the checkpoint wants it."""
        return self._tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(ids), vocab]: row i is of the token after ids[i]."""
        return self._engine.logits(self._checked(ids))

    def hidden(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(ids), hidden]: the last hidden states, after the final norm."""
        return self._engine.hidden(self._checked(ids))

    def _open_chat(
        self, messages: Sequence[Message], tools: Tools | None, thinking: bool, one_call: bool
    ) -> tuple[list[int], ChatText]:
        """The prompt of a conversation, and what reads the answer to it."""
        template = self._template
        if tools and "tools" not in template.source:
            raise SettingsError("Tools are given, but this model's chat template has no place for them.")
        if thinking and "enable_thinking" not in template.source:
            raise SettingsError("Thinking is asked for, but this model's chat template cannot turn it on.")
        prompt = template.render(messages, tools=tools, enable_thinking=thinking)
        ids = self._prompt(prompt, bos=False)  # the template spells out the special tokens
        return ids, ChatText(self._tokenizer, template.parser(prompt), one_call)

    def _constraint(
        self,
        params: SamplingParams,
        chat: ChatText | None,
        thinking: bool,
        tools: Tools,
        choice: ToolChoice,
    ) -> Constraint | None:
        """What keeps an answer to the grammar or the calls that are asked for, if any are."""
        forced = _forced_tools(tools, choice)
        if params.grammar is None and forced is None:
            return None
        answer = parts_of(params.grammar) if params.grammar else None
        if chat is None:
            return self._guide.constraint([answer] if answer else [])
        callable_tools, answer = (tools, answer) if forced is None else (forced, None)
        return self._guide.constraint(answer_grammar(self._guide, chat.parser, thinking, answer, callable_tools))

    @cached_property
    def _guide(self) -> Guide:
        ends = self._tokenizer.eos_ids | set(self.config.eos) | self._turn_ends
        return Guide(self._tokenizer, self.config.vocab, ends, self._template.parser().markup)

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        return self._template.stop_ids(self._tokenizer)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not 1 <= len(ids) <= self.context:
            raise PromptError(f"{len(ids)} tokens are given: it must be between 1 and the context of {self.context}.")
        return [int(token) for token in ids]

    def _checked_draft(self, draft: Draft) -> Draft:
        if draft in ("off", 0):
            return "off"
        deepest = self._engine.max_depth
        if draft == "auto" or (isinstance(draft, int) and not isinstance(draft, bool) and 1 <= draft <= deepest):
            return draft
        raise SettingsError(f"The draft length is {draft!r}: it must be auto, off or a number up to {deepest}.")


class _Text:
    """A detokenizer as the decoding loop calls it: token by token."""

    ended = False

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self.flush = detokenizer.flush

    def push(self, token: int) -> str:
        return self._detokenizer.push([token])


def _forced_tools(tools: Tools, choice: ToolChoice) -> Tools | None:
    """The tools of which one must be called; None where none must."""
    if choice in ("auto", "none"):
        return None
    if not tools:
        raise SettingsError("A tool call is asked for, but no tools are declared: give 'tools'.")
    if choice == "required":
        return tools
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise SettingsError(f"The tool choice is {choice!r}, which is neither auto, required nor one of the tools.")
    return named


def _is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
