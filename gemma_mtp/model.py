"""The public face of a model in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.checkpoints.hub import find_assistant, resolve
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.quantization import DTYPES, Dtype
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.drafting import Confidence, DraftSource, PromptLookup, TrainedDrafter
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verification import Decoding, TextStream
from gemma_mtp.engine.engine import MAX_DEPTH, Engine, SequenceState
from gemma_mtp.errors import CheckpointError, PairError, PromptError, SettingsError
from gemma_mtp.generation import Generation, Stream
from gemma_mtp.text.chat import ChatTemplate, Message
from gemma_mtp.text.chat_text import ChatText
from gemma_mtp.text.tokenizer import Detokenizer, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
Draft = int | str  # "auto", "off" or a number of tokens

DEFAULT_CONTEXT = 8192

_log = logging.getLogger("gemma_mtp")


class _AutoDepth:
    """AutoDepth that starts from the cost of this generation's own plain passes, so that no pass is spent on measuring.

    Until wider passes have been timed by use they are taken to cost a little more a row, as they do where memory is the
    limit; where they do not, the first rounds that draft say so.
    """

    ROW_COST = 0.08  # of a one-row pass, for each further row
    WIDEST = 9

    def __init__(self) -> None:
        self._auto: AutoDepth | None = None

    def choose(self, offers: Sequence[Confidence], limit: int) -> tuple[int, int]:
        return self._auto.choose(offers, limit) if self._auto else (0, 0)

    def update(
        self, confidence: Confidence | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        if self._auto is None:
            self._auto = AutoDepth([seconds_pass * (1 + self.ROW_COST * row) for row in range(self.WIDEST)])
        self._auto.update(confidence, drafted, accepted, seconds_draft, seconds_pass)


class Model:
    """A target with what drafts for it. Make one with `Model.load`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        name: str,
        drafter_name: str | None = None,
    ):
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self.name = name
        self.drafter_name = drafter_name or "prompt-lookup"

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
    ) -> Model:
        """Loads a checkpoint.

        model: "demo", a GGUF file, a folder as Hugging Face has it, or owner/name[:file] in the local hub cache.
        drafter: a drafter's file, folder or name; "none": only prompt lookup drafts. "auto" takes the one beside the
        model, if there is one.
        threads: of a pass; the machine's cores if None. context: tokens a generation may hold, prompt included;
        8192 or what the model was trained for if None. dtype: "as-is" keeps the file's quantisation (None means that),
        "f32" computes all in float32, and "q8_0", "q4_k" and the like (checkpoints/quantization.py) quantise matrices
        as they are loaded. isa: the instruction-set build, "auto" the best this CPU runs. drafter_dtype: the dtype of
        the drafter; None: "f32" with a target in "f32", otherwise as is.
        Raises CheckpointError, SettingsError, PairError.
        """
        if backend != "native":
            raise SettingsError(f"There is no backend '{backend}': this version has the native one.")
        precision, drafter_precision = _dtype(dtype), _dtype(drafter_dtype or ("f32" if dtype == "f32" else None))
        checkpoint = open_checkpoint(resolve(str(model)))
        config = checkpoint.config
        if not isinstance(config, ModelConfig):
            raise CheckpointError(f"{checkpoint.path} is a drafter: give it with its target.")
        if skipped := checkpoint.skipped:
            _log.warning("%s %s", checkpoint.path, skipped)
        tokenizer = _tokenizer(checkpoint)
        if context is not None and not 1 <= context <= config.context:
            raise SettingsError(f"The context is {context}: it must be between 1 and the model's {config.context}.")
        engine = Engine(
            config,
            checkpoint.weights,
            threads=_threads(threads),
            context=context or min(DEFAULT_CONTEXT, config.context),
            dtype=precision,
            isa=isa,
        )
        drafter_path = _drafter_path(drafter, model, checkpoint.path)
        drafter_name = None
        if drafter_path:
            assistant = open_checkpoint(drafter_path)
            if isinstance(assistant.config, ModelConfig):
                raise PairError(f"{assistant.path} is a target, not a drafter: give it as the model.")
            engine.attach(assistant.config, assistant.weights, drafter_precision)
            drafter_name = _name(assistant, drafter_path)
        return cls(engine, tokenizer, _template(checkpoint, tokenizer), _name(checkpoint, model), drafter_name)

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
    def engine(self) -> Engine:
        """What runs the passes: for benchmarks and tests."""
        return self._engine

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a template for conversations; without one they are written in plain turns."""
        return not self._template.is_plain

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        *,
        tools: Tools | None = None,
        thinking: bool = False,
    ) -> Generation:
        """Continues a prompt (text or token ids), or answers a conversation. Its tokens do not depend on `draft`.

        A conversation is a list of messages in OpenAI's form, {"role": ..., "content": ...}; `tools` are declared in
        OpenAI's form as well, and `thinking` lets the model reason before it answers. Stop strings are looked for in
        the answer alone.
        """
        stream = self.stream(prompt, params, draft, tools=tools, thinking=thinking)
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        draft: Draft = "auto",
        *,
        tools: Tools | None = None,
        thinking: bool = False,
    ) -> Stream:
        """The same, piece by piece. Raises PromptError and SettingsError before the first piece."""
        params = params or SamplingParams()
        ends = self._tokenizer.eos_ids | set(self.config.eos)
        chat: ChatText | None = None
        if _is_conversation(prompt):
            ids, chat = self._ask(prompt, tools, thinking)
            ends |= self._turn_ends
        elif tools or thinking:
            raise SettingsError("Tools and thinking are for conversations: give a list of messages as the prompt.")
        else:
            ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]  # type: ignore[arg-type]
        text: TextStream = chat or _Text(self._tokenizer.stream(skip_special=True))
        depth = self._depth(draft)
        sequence = self._engine.create()
        try:
            decoding = Decoding(
                self._engine,
                sequence,
                ids,
                params,
                text=text,
                context=self.context,
                sources=self._sources(sequence, params) if depth else (),
                depth=depth,
                eos_ids=ends,
            )
        except PromptError:
            self._engine.release(sequence)
            raise
        return Stream(decoding, self._engine, sequence, params.logprobs > 0, chat)

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

    def _sources(self, sequence: SequenceState, params: SamplingParams) -> list[DraftSource]:
        """What drafts, the first being the one that drafts at a fixed depth."""
        lookup = PromptLookup()
        return [TrainedDrafter(self._engine, sequence, params), lookup] if self._engine.drafter else [lookup]

    def _ask(self, messages: Sequence[Message], tools: Tools | None, thinking: bool) -> tuple[list[int], ChatText]:
        """The prompt of a conversation, and what reads the answer to it."""
        template = self._template
        if tools and "tools" not in template.source:
            raise SettingsError("Tools are given, but this model's chat template has no place for them.")
        if thinking and "enable_thinking" not in template.source:
            raise SettingsError("Thinking is asked for, but this model's chat template cannot turn it on.")
        prompt = template.render(messages, tools=tools, enable_thinking=thinking)
        ids = self._tokenizer.encode(prompt, bos=False)  # the template spells out the special tokens
        return ids, ChatText(self._tokenizer, template.parser(prompt))

    @cached_property
    def _turn_ends(self) -> frozenset[int]:
        return self._template.stop_ids(self._tokenizer)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not 1 <= len(ids) <= self.context:
            raise PromptError(f"{len(ids)} tokens are given: it must be between 1 and the context of {self.context}.")
        return [int(token) for token in ids]

    def _depth(self, draft: Draft) -> DepthControl | None:
        if draft == "off" or draft == 0:
            return None
        if draft == "auto":
            return _AutoDepth()
        if isinstance(draft, int) and 1 <= draft <= MAX_DEPTH:
            return FixedDepth(draft)
        raise SettingsError(f"The draft length is {draft!r}: it must be auto, off or a number up to {MAX_DEPTH}.")


class _Text:
    """A detokenizer as the decoding loop calls it: token by token."""

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self.flush = detokenizer.flush

    def push(self, token: int) -> str:
        return self._detokenizer.push([token])


def _dtype(asked: str | None) -> Dtype:
    chosen = next((known for known in DTYPES if known == (asked or "as-is").lower()), None)
    if chosen is None:
        raise SettingsError(f"There is no dtype '{asked}': use one of {', '.join(DTYPES)}.")
    return chosen


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.metadata is None:
        return Tokenizer.from_folder(checkpoint.path)
    return Tokenizer.from_gguf(checkpoint.metadata)


def _template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate:
    if checkpoint.metadata is None:
        return ChatTemplate.from_folder(checkpoint.path, tokenizer)
    return ChatTemplate.from_gguf(checkpoint.metadata, tokenizer)


def _is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def _drafter_path(drafter: str | Path, model: str | Path, target: Path) -> Path | None:
    if str(drafter) == "none":
        return None
    return find_assistant(str(model), target) if str(drafter) == "auto" else resolve(str(drafter))


def _name(checkpoint: Checkpoint, model: str | Path) -> str:
    """What a GGUF file calls itself; of a folder, its name or the one it has on the hub."""
    if checkpoint.metadata is None:
        if checkpoint.path.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
            return checkpoint.path.parents[1].name.rpartition("--")[2]
        return Path(model).name or checkpoint.path.resolve().name
    return str(checkpoint.metadata.get("general.name", checkpoint.path.stem))


def _threads(asked: int | None) -> int:
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= asked <= 1024:
        raise SettingsError(f"The number of threads is {asked}: it must be between 1 and 1024.")
    return asked
