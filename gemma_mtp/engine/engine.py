"""One model in memory: its plan, its cache, and passes over sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma_mtp import _native
from gemma_mtp.checkpoints.quantization import Dtype
from gemma_mtp.checkpoints.tensors import TensorInfo
from gemma_mtp.config import ModelConfig
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.verification import PROMPT_CHUNK, Rows, TokenLogprobs
from gemma_mtp.errors import PromptError
from gemma_mtp.models.decoder import decode
from gemma_mtp.ops.native import NativeOps, NativeWeights

MAX_DEPTH = 32  # tokens a round can draft
_MAX_OUTPUTS = 64


@dataclass
class SequenceState:
    """One sequence: its place in the cache, and its tokens."""

    handle: int
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Runs a target natively. Implements decoding.verification.Target.

    threads: of a pass; context: the most tokens a sequence may hold; isa: the instruction-set build, "auto" the best.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        threads: int,
        context: int,
        dtype: Dtype = "as-is",
        isa: str = "auto",
    ):
        self.config, self.context, self.threads, self.dtype = config, context, threads, dtype
        pool = _native.ThreadPool(threads)
        self.weights = NativeWeights(tensors, pool, dtype)
        self.plan = _native.Plan(pool, isa, PROMPT_CHUNK, _MAX_OUTPUTS)
        decoded = decode(NativeOps(self.plan, self.weights, config.eps), config)
        layers = [(layer.kv_heads, layer.head_dim, layer.window or 0) for layer in config.layers]
        self.cache = _native.KvCache("f32" if dtype == "f32" else "f16", layers, context, rollback=2 * MAX_DEPTH)
        self._runner = _native.Runner(self.plan, self.cache, decoded.logits, decoded.hidden, config.vocab)

    def create(self) -> SequenceState:
        """A new, empty sequence; to be given back with `release`."""
        return SequenceState(self.cache.create())

    def release(self, sequence: SequenceState) -> None:
        self.cache.release(sequence.handle)

    def step(self, sequence: SequenceState, tokens: Sequence[int], rows: int, params: SamplingParams) -> Rows:
        """See Target.step. Raises PromptError for a token outside the vocabulary or a full context."""
        self._forward(sequence, tokens, rows)
        if not rows:
            return Rows([])
        native = _native.SampleParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            seed=params.seed,
            logprobs=params.logprobs,
        )
        seen = sequence.tokens[: len(sequence.tokens) - rows + 1] if params.repetition_penalty != 1 else []
        choices = self._runner.choose(native, np.array(seen, np.int32))
        logprobs = [TokenLogprobs(chosen, top) for _, chosen, top in choices] if params.logprobs else None
        return Rows([token for token, _, _ in choices], logprobs)

    def truncate(self, sequence: SequenceState, length: int) -> None:
        self.cache.truncate(sequence.handle, length)
        del sequence.tokens[length:]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), vocab]: row i is of the token after tokens[i]."""
        return self._all_rows(tokens, self._runner.logits)

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(tokens), hidden]: the last hidden states, after the final norm."""
        return self._all_rows(tokens, self._runner.hidden)

    def last_logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] of the rows that the last pass sampled."""
        return self._runner.logits()

    def _forward(self, sequence: SequenceState, tokens: Sequence[int], outputs: int) -> None:
        try:
            self._runner.forward([(sequence.handle, np.array(tokens, np.int32), outputs)])
        except _native.InputError as fault:
            raise PromptError(f"The tokens cannot be run: {fault}.") from None
        sequence.tokens.extend(tokens)

    def _all_rows(self, tokens: Sequence[int], read: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        sequence = self.create()
        try:
            parts = []
            for start in range(0, len(tokens), _MAX_OUTPUTS):
                part = tokens[start : start + _MAX_OUTPUTS]
                self._forward(sequence, part, len(part))
                parts.append(read())
            return np.concatenate(parts)
        finally:
            self.release(sequence)
