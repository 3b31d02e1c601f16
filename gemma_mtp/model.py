"""The public face of a model in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import Checkpoint, open_checkpoint
from gemma_mtp.checkpoints.quantization import DTYPES
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.drafting import PromptLookup
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.verification import Decoding, FinishReason, Piece, TokenLogprobs
from gemma_mtp.engine.engine import MAX_DEPTH, Engine, SequenceState
from gemma_mtp.errors import CheckpointError, PairError, PromptError, SettingsError
from gemma_mtp.text.tokenizer import Detokenizer, Tokenizer

Prompt = str | Sequence[int]
Draft = int | str  # "auto", "off" or a number of tokens

DEFAULT_CONTEXT = 8192

_log = logging.getLogger("gemma_mtp")


@dataclass
class Generation:
    """A finished generation. `tokens` ends with the stop token, if one ended it; `text` leaves it out."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while it runs
    stats: Stats = field(default_factory=Stats)
    logprobs: list[TokenLogprobs] | None = None


class Stream:
    """Iterate it for the pieces of a generation; `generation` holds what has come so far, and the end of it."""

    def __init__(self, decoding: Decoding[SequenceState], engine: Engine, sequence: SequenceState, logprobs: bool):
        self.generation = Generation(stats=decoding.stats, tokens=decoding.tokens, logprobs=[] if logprobs else None)
        self._pieces = self._run(decoding, engine, sequence)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation here and frees its cache."""
        self._pieces.close()

    def _run(
        self, decoding: Decoding[SequenceState], engine: Engine, sequence: SequenceState
    ) -> Generator[Piece, None, None]:
        try:
            for piece in decoding:
                self.generation.text += piece.text
                if self.generation.logprobs is not None and piece.logprobs:
                    self.generation.logprobs += piece.logprobs
                yield piece
        finally:
            self.generation.finish_reason = decoding.finish_reason or "cancelled"
            engine.release(sequence)


class _AutoDepth:
    """AutoDepth that starts from the cost of this generation's own plain passes, so that no pass is spent on measuring.

    Until wider passes have been timed by use they are taken to cost a little more a row, as they do where memory is the
    limit; where they do not, the first rounds that draft say so.
    """

    ROW_COST = 0.08  # of a one-row pass, for each further row
    WIDEST = 9

    def __init__(self) -> None:
        self._auto: AutoDepth | None = None

    def choose(self, confidence: int, limit: int) -> int:
        return self._auto.choose(confidence, limit) if self._auto else 0

    def update(
        self, confidence: int | None, drafted: int, accepted: int, seconds_draft: float, seconds_pass: float
    ) -> None:
        if self._auto is None:
            self._auto = AutoDepth([seconds_pass * (1 + self.ROW_COST * row) for row in range(self.WIDEST)])
        self._auto.update(confidence, drafted, accepted, seconds_draft, seconds_pass)


class Model:
    """A target with what drafts for it. Make one with `Model.load`."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str):
        self._engine, self._tokenizer = engine, tokenizer
        self.name = name
        self.drafter_name = "prompt-lookup"

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
    ) -> Model:
        """Loads a checkpoint.

        model: "demo", a GGUF file, a folder as Hugging Face has it, or owner/name[:file] in the local hub cache.
        drafter: "auto" drafts by prompt lookup; "none" too, as this version has no trained drafters.
        threads: of a pass; the machine's cores if None. context: tokens a generation may hold, prompt included;
        8192 or what the model was trained for if None. dtype: "as-is" keeps the file's quantisation (None means that),
        "f32" computes all in float32, and "q8_0", "q4_k" and the like (checkpoints/quantization.py) quantise matrices
        as they are loaded. isa: the instruction-set build, "auto" the best this CPU runs.
        Raises CheckpointError, SettingsError, PairError.
        """
        if backend != "native":
            raise SettingsError(f"There is no backend '{backend}': this version has the native one.")
        if str(drafter) not in ("auto", "none"):
            raise PairError(f"The drafter {drafter} cannot be used: this version drafts by prompt lookup alone.")
        chosen = next((known for known in DTYPES if known == (dtype or "as-is").lower()), None)
        if chosen is None:
            raise SettingsError(f"There is no dtype '{dtype}': use one of {', '.join(DTYPES)}.")
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
            dtype=chosen,
            isa=isa,
        )
        return cls(engine, tokenizer, _name(checkpoint, model))

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

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, draft: Draft = "auto"
    ) -> Generation:
        """Continues a prompt (text or token ids). Its tokens do not depend on `draft`."""
        stream = self.stream(prompt, params, draft)
        for _ in stream:
            pass
        return stream.generation

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, draft: Draft = "auto") -> Stream:
        """The same, piece by piece. Raises PromptError and SettingsError before the first piece."""
        params = params or SamplingParams()
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        depth = self._depth(draft)
        sequence = self._engine.create()
        try:
            decoding = Decoding(
                self._engine,
                sequence,
                ids,
                params,
                text=_Text(self._tokenizer.stream(skip_special=True)),
                context=self.context,
                source=PromptLookup() if depth else None,
                depth=depth,
                eos_ids=self._tokenizer.eos_ids | set(self.config.eos),
            )
        except PromptError:
            self._engine.release(sequence)
            raise
        return Stream(decoding, self._engine, sequence, params.logprobs > 0)

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


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.metadata is None:
        return Tokenizer.from_folder(checkpoint.path)
    return Tokenizer.from_gguf(checkpoint.metadata)


def _name(checkpoint: Checkpoint, model: str | Path) -> str:
    """What a GGUF file calls itself; of a folder, its name or the one it has on the hub."""
    if checkpoint.metadata is None:
        return Path(model).name or checkpoint.path.resolve().name
    return str(checkpoint.metadata.get("general.name", checkpoint.path.stem))


def _threads(asked: int | None) -> int:
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= asked <= 1024:
        raise SettingsError(f"The number of threads is {asked}: it must be between 1 and 1024.")
    return asked
